"""Whatever would have vLLM take another platform than ours is refused with one sentence, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pomarium.cluster.provision.platform_choice import Plugin, diverted, installed

OURS = Plugin("pomarium", "pomarium")
METAL = Plugin("metal", "vllm-metal")


@pytest.mark.parametrize(
    ("environ", "plugins", "parts"),
    [
        ({}, [OURS], []),
        ({"VLLM_TARGET_DEVICE": "metal"}, [OURS], []),
        ({"VLLM_PLUGINS": "x,pomarium"}, [OURS], []),
        ({"VLLM_PLUGINS": "pomarium"}, [OURS, METAL], []),
        ({"VLLM_TARGET_DEVICE": "CPU"}, [OURS], [("VLLM_TARGET_DEVICE=CPU", "unset it")]),
        ({"VLLM_PLUGINS": "x"}, [OURS, METAL], [("VLLM_PLUGINS=x leaves out", "set it to x,pomarium")]),
        ({"VLLM_PLUGINS": ""}, [OURS], [("VLLM_PLUGINS= leaves out", "set it to pomarium,")]),
        ({}, [METAL, OURS], [("metal of the package vllm-metal", "set VLLM_PLUGINS=pomarium.")]),
        ({"VLLM_PLUGINS": "x,metal,pomarium"}, [METAL], [("metal of the package", "set VLLM_PLUGINS=x,pomarium.")]),
        (
            {"VLLM_PLUGINS": "metal", "VLLM_TARGET_DEVICE": "cpu"},
            [METAL],
            [("TARGET_DEVICE", ""), ("leaves out", ""), ("Another", "")],
        ),
        ({"VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": "x", "VLLM_METAL_USE_MLX": "0"}, [METAL], []),
    ],
)
def test_each_diversion_has_a_sentence(
    environ: dict[str, str], plugins: list[Plugin], parts: list[tuple[str, str]]
) -> None:
    sentences = diverted(environ, plugins)
    assert len(sentences) == len(parts)
    for sentence, (what, cure) in zip(sentences, parts, strict=True):
        assert what in sentence
        assert cure in sentence
        assert sentence.endswith(".")


@pytest.fixture
def another_plugin(tmp_path: Path) -> Path:
    """A folder for sys.path with a distribution that carries a platform plugin of vLLM, which is active."""
    (tmp_path / "other_metal.py").write_text("def register():\n    return 'other_metal.Platform'\n")
    info = tmp_path / "other_metal-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-metal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nmetal = other_metal:register\n")
    return tmp_path


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    return subprocess.run(
        [sys.executable, *command], env=clean | environ, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_plugin_on_the_path_is_found(another_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed() == (OURS,)
    monkeypatch.syspath_prepend(str(another_plugin))
    assert installed() == (Plugin("metal", "other-metal"), OURS)


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_the_command_line_names_another_plugin(another_plugin: Path, command: str) -> None:
    done = run("-m", "pomarium.cluster.cli.main", command, PYTHONPATH=str(another_plugin))
    assert done.returncode == 1
    assert "metal of the package other-metal" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_refuses_a_target_device() -> None:
    done = run("-m", "pomarium.cluster.cli.main", "serve", VLLM_TARGET_DEVICE="cpu")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "VLLM_TARGET_DEVICE=cpu makes vLLM ignore" in done.stderr


ENGINE = "from vllm.engine.arg_utils import EngineArgs; EngineArgs(model='there-is-none'); print('made')"
"""What `vllm.LLM` and `vllm serve` do first."""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("environ", "refused"),
    [
        ({}, False),
        ({"VLLM_TARGET_DEVICE": "cpu"}, True),
        ({"VLLM_TARGET_DEVICE": "cpu", "VLLM_METAL_USE_MLX": "0"}, False),
    ],
)
def test_vllm_itself_refuses(environ: dict[str, str], refused: bool) -> None:
    done = run("-c", ENGINE, **environ)
    assert (done.returncode != 0) is refused, done.stderr
    assert ("UnsupportedError: VLLM_TARGET_DEVICE=cpu makes vLLM ignore" in done.stderr) is refused
    assert ("made" in done.stdout) is not refused


@pytest.mark.e2e
@pytest.mark.parametrize("environ", [{}, {"VLLM_PLUGINS": "pomarium"}])
def test_vllm_beside_another_plugin(another_plugin: Path, environ: dict[str, str]) -> None:
    done = run("-c", ENGINE, PYTHONPATH=str(another_plugin), **environ)
    if environ:
        assert "made" in done.stdout, done.stderr
    else:
        assert done.returncode != 0
        assert "metal" in done.stderr.splitlines()[-1]
