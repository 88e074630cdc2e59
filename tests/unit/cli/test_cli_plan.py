"""`pomarium plan` prints what placement found, or one sentence that says what is missing, from files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import write_gguf
from tiny_models import write_checkpoint

from pomarium.cluster.cli.main import main

EXAMPLE = Path(__file__).parents[3] / "deploy/rack.example.yaml"

RACK = """\
macs:
  - {name: small, address: 10.0.0.1, memory: 1GiB, model_memory: 300MiB, bandwidth: 50GB/s, flops: 1TFLOPS}
  - {name: large, address: 10.0.0.2, memory: 2GiB, model_memory: 330MiB, bandwidth: 90GB/s, flops: 2TFLOPS}
models:
  - {name: chat, source: SOURCE, stages: 2, context: 128, streams: 2}
"""


@pytest.fixture
def rack(tmp_path: Path) -> Path:
    path = tmp_path / "rack.yaml"
    path.write_text(RACK.replace("SOURCE", str(write_checkpoint("llama", tmp_path / "llama"))))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def figures(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    plan: dict[str, Any] = json.loads(out)["plan"]
    return plan


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--rack", EXAMPLE, "--stages", "3", "--concurrency", "6")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "smollm2: 3 stages, 8192 tokens of context, 6 requests at once"
    assert lines[2].split() == ["Mac", "chip", "layers", "weights", "KV", "cache", "used", "of", "step", "hop", "busy"]
    table = lines[3:6]
    assert {line.split()[0] for line in table} == {"studio-1", "studio-2", "mini-1"}
    assert len({len(line) for line in lines[2:6]}) == 1
    assert "embedding + 0-" in table[0]
    assert "-29 + head" in table[2]
    assert [line.split("  ")[0] for line in lines[7:]] == ["one request", "all requests", "bottleneck"]
    assert "tokens/s" in lines[7]


def test_json_agrees_with_the_options(capsys: pytest.CaptureFixture[str], rack: Path, tmp_path: Path) -> None:
    """A folder, its name in rack.yaml, and options before the file's defaults."""
    by_path = figures(
        capsys, tmp_path / "llama", "--rack", rack, "--stages", "2", "--context", "128", "--concurrency", "2"
    )
    by_name = figures(capsys, "chat", "--rack", rack)
    assert by_path == by_name
    assert [(s["first"], s["end"]) for s in by_name["stages"]] in ([(0, 1), (1, 4)], [(0, 2), (2, 4)], [(0, 3), (3, 4)])
    assert by_name["tokens_per_s"] == pytest.approx(2 / by_name["round_s"])
    assert by_name["bottleneck"] in ("small", "large")
    assert len(figures(capsys, "chat", "--rack", rack, "--stages", "auto")["stages"]) == 1
    assert figures(capsys, "chat", "--rack", rack, "--objective", "latency") != {}


def test_a_gguf_file_is_read_in_place(
    capsys: pytest.CaptureFixture[str], rack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf("llama", tmp_path / "tiny.gguf", Kind.Q4_0)
    stages = figures(capsys, tmp_path / "tiny.gguf", "--rack", rack)["stages"]
    assert [s["mac"] for s in stages] == ["large"]
    assert not (tmp_path / "cache").exists()


def test_what_does_not_fit_is_refused_with_what_is_missing(
    capsys: pytest.CaptureFixture[str], rack: Path, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "chat", "--rack", rack, "--stages", "1", "--context", "400000")
    assert (code, out) == (1, "")
    assert err.startswith("pomarium: llama with KV cache for 2 x 400000 tokens needs ")
    assert " on large are missing; add memory or a Mac" in err
    fits = int(err.split("(a context of ")[1].split()[0])
    one = ("chat", "--rack", rack, "--stages", "1", "--context")
    assert figures(capsys, *one, str(fits))["stages"]
    code, out, _ = run(capsys, *one, str(fits + 16), "--json")
    refusal = json.loads(out)["refusal"]
    assert code == 1
    assert 0 < refusal["missing"] == sum(size for _, size in refusal["shortfalls"]) <= 2 * 16 * 4 * 128 * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stages", "3"], "3 stages need 3 Macs and there are 2."),
        (["--stages", "0"], "--stages: '0' is neither `auto` nor a number of stages."),
        (["--stages", "9" * 5000], "has 4 layers"),
        (["--context", "0"], "--context 0 is too few: give at least 1."),
        (["--concurrency", "-1"], "--concurrency -1 is too few: give at least 1."),
        (["--prompt-share", "1"], "--prompt-share 1.0 is not from 0 to under 1."),
        (["--prompt-share", "nan"], "--prompt-share nan is not from 0 to under 1."),
    ],
)
def test_senseless_options(capsys: pytest.CaptureFixture[str], rack: Path, arguments: list[str], sentence: str) -> None:
    code, out, err = run(capsys, "chat", "--rack", rack, *arguments)
    assert (code, out) == (1, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_faults_of_the_files(capsys: pytest.CaptureFixture[str], rack: Path) -> None:
    assert "There is no model 'nowhere'" in run(capsys, "nowhere", "--rack", rack)[2]
    rack.write_text(rack.read_text().replace("1GiB", "1"))
    assert "line 2, macs[1].memory: '1' is not a size" in run(capsys, "chat", "--rack", rack)[2]
    with pytest.raises(SystemExit) as left_out:
        main(["plan"])
    assert left_out.value.code == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    assert "Times are estimates" in capsys.readouterr().out
