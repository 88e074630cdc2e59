"""The command line of batches: what is refused before anything starts, and runs that need no engine of their own."""

import json
import os
from pathlib import Path

import pytest
from endpoint_stub import Stub, serving

from pomarium.cluster.cli.main import EXIT_FAULT, main


def write(folder: Path, count: int) -> list[str]:
    """IN and OUT."""
    lines = [
        json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": str(n)}})
        for n in range(count)
    ]
    (folder / "in.jsonl").write_text("\n".join([*lines, "{broken"]))
    return [str(folder / "in.jsonl"), str(folder / "out.jsonl")]


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--overwrite"], "--resume keeps earlier results and --overwrite drops them"),
        (["--endpoint", "http://x", "--stages", "2"], "--stages is for engines of the job's own"),
        (["--endpoint", "http://x", "--max-num-seqs", "2"], "--max-num-seqs is for engines of the job's own"),
        (["--concurrency", "4"], "--concurrency is for --endpoint"),
        (["--endpoint", "http://x", "--concurrency", "0"], "--concurrency 0 asks nothing"),
        (["--replicas", "0"], "--replicas 0 answers nothing"),
        (["third.jsonl"], "'third.jsonl' is one file too many"),
        (["--endpoint", "http://127.0.0.1:9"], "No endpoint answers at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["batch", "run", *write(tmp_path, 1), *more]) == EXIT_FAULT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "run", str(tmp_path / "none"), str(tmp_path / "out")]) == EXIT_FAULT
    assert "There is no file" in capsys.readouterr().err


def test_an_endpoint_answers_and_a_finished_job_asks_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path, 3)
    stub = Stub()
    with serving(stub) as url:
        assert main(["batch", "run", *files, "--endpoint", url]) == 0
        assert "3 results in" in capfd.readouterr().out
        assert main(["batch", "run", *files, "--endpoint", url]) == EXIT_FAULT
        assert "--resume, or drop them with --overwrite" in capfd.readouterr().err
    assert main(["batch", "run", *files, "--resume"]) == 0
    assert "all 4 lines of" in capfd.readouterr().out
    assert len(stub.keys) == 3
    assert len(Path(files[1]).read_text().splitlines()) == 3


def test_text_that_is_no_utf_8_is_answered_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Half an emoji in lines, and file names that are bytes."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    line = {"custom_id": "\ud83d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "\ud83d"}}
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n" + "[" * 20_000)
    files = [str(folder / "in.jsonl"), str(folder / "out.jsonl")]
    stub = Stub()
    with serving(stub) as url:
        assert main(["batch", "run", *files, "--endpoint", url]) == 0
    assert "1 results in" in capfd.readouterr().out
    assert main(["batch", "run", *files, "--resume"]) == 0
    assert "caf\\udce9" in capfd.readouterr().out
    assert len(stub.keys) == 1
    (result,) = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert (result["custom_id"], result["response"]["body"]["got"]["prompt"]) == ("\ud83d", "\ud83d")


def test_jobs_need_a_rack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["submit", *write(tmp_path, 1)], ["status"], ["logs", "x"], ["cancel", "x"]):
        assert main(["batch", *command]) == EXIT_FAULT
        assert "No rack is up on this machine" in capsys.readouterr().err
