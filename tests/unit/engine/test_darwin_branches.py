"""Each place that asks for a Mac stands in docs/macos.md with the test that runs it; and some of them."""

import os
import re
import sys
from pathlib import Path

import pytest

from pomarium.cluster.rack import netns, simulate
from pomarium.worker.device import Device
from pomarium.worker.errors import SettingsError
from pomarium.worker.settings import DeviceKind

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/macos.md"
ASKS = re.compile(
    r"""["']darwin["']|Darwin|sys\.platform|platform\.system\(\)|GpuBackend\.METAL|metal\.is_available\(|sw_vers""",
)


def files_that_ask() -> set[str]:
    found = [path for layer in ("cluster", "worker", "kernels", "proto") for path in (ROOT / layer).rglob("*.py")]
    found += [*(ROOT / "deploy").rglob("*.sh"), *(ROOT / "tests/emulator").rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in found if ASKS.search(path.read_text(encoding="utf-8"))}


def rows() -> dict[str, list[str]]:
    """File -> tests, of the page's first table."""
    table = PAGE.read_text(encoding="utf-8").partition("## What only a Mac can tell")[0]
    return {
        file: re.findall(r"`(tests/[\w/.]+)`", tests)
        for file, tests in re.findall(r"^\| `([\w/.]+)` \|.*\|([^|]*)\|$", table, re.MULTILINE)
    }


def test_every_file_that_asks_for_a_mac_is_in_the_table() -> None:
    assert files_that_ask() == rows().keys(), "mend the first table of docs/macos.md"


def test_every_row_names_a_test_of_that_branch() -> None:
    for file, tests in rows().items():
        assert tests, file
        for test in tests:
            text = (ROOT / test).read_text(encoding="utf-8")
            assert re.search("darwin|metal|macos", text, re.IGNORECASE), f"{test} runs no branch of {file}"


@pytest.mark.parametrize(
    "text",
    ['if sys.platform == "darwin":', "platform.system()", "device.backend is GpuBackend.METAL",
     "sw_vers -productVersion", "mx.metal.is_available()", "facts.system != 'Darwin'"],
)  # fmt: skip
def test_what_asks_is_found(text: str) -> None:
    assert ASKS.search(text)


# --- branches that no other file's tests run ------------------------------------------------------------------------


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.mark.usefixtures("darwin")
def test_a_mac_holds_no_process_to_cores() -> None:
    with pytest.raises(SettingsError, match="--cpus needs Linux"):
        simulate._check_cores([(0,), ()])
    simulate._check_cores([(), ()])


@pytest.mark.usefixtures("darwin")
def test_a_mac_has_no_network_namespaces() -> None:
    with pytest.raises(SettingsError, match="--namespaces needs Linux: leave it out"):
        netns.require()


def test_a_mac_forks_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config  # noqa: F401 - vLLM imports its platforms by itself, and cannot from within one

    from pomarium.cluster.engine import platform

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setattr(platform, "_ray_address", lambda: None)
    platform._set_process_start(Device(DeviceKind.CPU, None, "cpu", ("float32",)))
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
