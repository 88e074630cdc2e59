"""`pomarium env`."""

import argparse
import json
from pathlib import Path

import pytest

from pomarium.cluster.cli import env
from pomarium.worker.device import GpuBackend
from pomarium.worker.settings import VARIABLES


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    env.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["env", *arguments])
    return int(parsed.run(parsed))


def rows(environ: dict[str, str], backend: GpuBackend | None = None) -> dict[str, env.Resolution]:
    return {row.name: row for row in env.resolve(environ, backend)}


def test_every_variable_is_printed_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["variable", "value", "from", "comes", "to"]
    assert [line.split()[0] for line in lines] == [variable.name for variable in VARIABLES]
    assert all("default" in line for line in lines)
    column = header.index("comes to")
    assert all(line[column - 1] == " " != line[column] for line in lines), "aligned"


def test_an_invalid_variable_ends_in_1_and_the_others_are_still_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_METAL_DEBUG", "maybe")
    monkeypatch.setenv("VLLM_METAL_MLA_KERNEL", "yes")
    monkeypatch.setenv("VLLM_METAL_MEMORY_FRACTON", "1")
    assert run() == 1
    out = capsys.readouterr().out
    assert "VLLM_METAL_DEBUG='maybe' is not accepted: set it to 1/0" in out
    assert any(line.split()[:4] == ["VLLM_METAL_MLA_KERNEL", "yes", "environment", "on"] for line in out.splitlines())
    assert "did you mean VLLM_METAL_MEMORY_FRACTION?" in out


def test_json_holds_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "2")
    assert run("--json") == 1
    printed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(printed) == [variable.name for variable in VARIABLES]
    assert printed["VLLM_USE_MODELSCOPE"]["resolved"] is None
    assert "VLLM_USE_MODELSCOPE='2'" in printed["VLLM_USE_MODELSCOPE"]["error"]
    assert printed["VLLM_METAL_USE_MLX"] == {
        "name": "VLLM_METAL_USE_MLX",
        "value": "1",
        "source": "default",
        "resolved": "MLX",
        "error": None,
    }


@pytest.mark.parametrize(
    ("environ", "backend", "resolved"),
    [
        ({}, None, "cpu (MLX has no GPU backend on this machine)"),
        ({}, GpuBackend.METAL, "gpu (metal)"),
        ({"VLLM_MLX_DEVICE": "cpu"}, GpuBackend.METAL, "cpu"),
        ({"VLLM_MLX_DEVICE": "GPU"}, GpuBackend.CUDA, "gpu (cuda)"),
        ({"VLLM_MLX_DEVICE": "gpu"}, None, None),
    ],
)
def test_device(environ: dict[str, str], backend: GpuBackend | None, resolved: str | None) -> None:
    row = rows(environ, backend)["VLLM_MLX_DEVICE"]
    assert row.resolved == resolved
    assert (row.error is None) is (resolved is not None)


@pytest.mark.parametrize(
    ("environ", "backend", "resolved"),
    [
        ({}, None, "0.9 of this machine's memory, 2 to 4 GiB for the KV cache"),
        ({}, GpuBackend.METAL, "0.9 of the recommended working set"),
        ({"VLLM_METAL_MEMORY_FRACTION": "0.5"}, None, "0.5 of this machine's memory"),
        ({"VLLM_METAL_USE_PAGED_ATTENTION": "0"}, None, "the model and one sequence of maximum length"),
    ],
)
def test_memory(environ: dict[str, str], backend: GpuBackend | None, resolved: str) -> None:
    assert rows(environ, backend)["VLLM_METAL_MEMORY_FRACTION"].resolved == resolved


@pytest.mark.parametrize(("backend", "resolved"), [(None, "on (MLX operations on the CPU)"), (GpuBackend.METAL, "on")])
def test_kernels_have_effect_on_a_gpu(backend: GpuBackend | None, resolved: str) -> None:
    found = rows({"VLLM_METAL_MLA_KERNEL": "1"}, backend)
    assert found["VLLM_METAL_MLA_KERNEL"].resolved == resolved
    assert found["VLLM_METAL_GDN_LAZY_KERNELS"].resolved == resolved


def test_a_device_that_does_not_answer_is_an_error_of_its_variable() -> None:
    (row,) = (row for row in env.resolve({}, GpuBackend.METAL, "No Metal.") if row.name == "VLLM_MLX_DEVICE")
    assert (row.error, row.resolved) == ("No Metal.", None)


def test_the_rest(tmp_path: Path) -> None:
    found = rows(
        {
            "VLLM_METAL_USE_MLX": "off",
            "VLLM_USE_MODELSCOPE": "on",
            "VLLM_METAL_MODELSCOPE_CACHE": str(tmp_path),
            "VLLM_METAL_VISIBLE_DEVICES": "1",
        }
    )
    assert found["VLLM_METAL_USE_MLX"].resolved == "vLLM's own CPU backend"
    assert found["VLLM_USE_MODELSCOPE"].resolved == "ModelScope"
    assert found["VLLM_METAL_MODELSCOPE_CACHE"].resolved == str(tmp_path)
    assert found["VLLM_METAL_VISIBLE_DEVICES"].resolved == "overridden by the executor with a warning"
    assert all(row.error is None for row in found.values())


def test_a_control_character_in_a_value_does_not_break_the_table() -> None:
    printed = env.table(env.resolve({"VLLM_METAL_DEBUG": "1\n2", "VLLM_MLX_DEVICE": ""}, None))
    assert len(printed.splitlines()) == len(VARIABLES) + 1
