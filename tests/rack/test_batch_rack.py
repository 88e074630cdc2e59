"""Batches on a rack of four simulated Macs: through `ray job submit`, while a Mac is killed; and a killed driver."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from rack_serving import Rack, SharedRack, until
from serve_process import Server

from pomarium.cluster.rack import current

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LINES, BAD = 60, 3
OPTIONS = ["--stages", "2", "--max-model-len", "256"]


@pytest.fixture(scope="module")
def rack(four_macs: SharedRack) -> Rack:
    simulated = four_macs.ensure()
    environ = four_macs.environ | current.for_ray_commands(simulated.current)
    return Rack(Server(four_macs.folder), simulated, environ)


def write(path: Path, count: int, tokens: int) -> None:
    """`count` lines, every twentieth of which cannot be asked. Answers of 1 to 10 times `tokens`, so that they come one
    after another."""
    with path.open("w") as file:
        for number in range(count):
            if number % 20 == 7:
                file.write("{broken\n")
                continue
            body = {"model": "smollm2", "prompt": f"Once upon a time {number}", "temperature": 0, "ignore_eos": True}
            body["max_tokens"] = tokens * (1 + number % 10)
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check(folder: Path, count: int) -> None:
    """Each line has one answer, whichever run gave it."""
    results, errors = read(folder / "out.jsonl"), read(folder / "out.errors.jsonl")
    bad = [number for number in range(count) if number % 20 == 7]
    assert Counter(r["custom_id"] for r in results) == Counter(f"r{n}" for n in range(count) if n not in bad)
    assert sorted(e["line"] for e in errors) == [number + 1 for number in bad]
    assert all(e["error"]["code"] == "invalid_json" for e in errors)
    assert all(r["response"]["body"]["choices"][0]["text"] for r in results)


def test_ray_job_submit_gives_every_line_its_answer_also_when_a_mac_is_killed(rack: Rack, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", LINES, 5)
    out = tmp_path / "out.jsonl"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(tmp_path)]
    entry = ["python", "-m", "pomarium.cluster.batch", str(tmp_path / "in.jsonl"), str(out), *OPTIONS]
    with (tmp_path / "job.log").open("wb") as log:
        job = subprocess.Popen([*ray, "--", *entry], env=rack.environ, stdout=log, stderr=subprocess.STDOUT)
    until(lambda: answered(out) >= 20 or job.poll() is not None, 200)
    assert job.poll() is None, (tmp_path / "job.log").read_text()[-4000:]
    assert answered(out) < LINES - BAD, "the job was over before its Mac was killed"
    victim = rack.stages()[0]["mac"]
    rack.simulated.kill(victim)
    assert job.wait(400) == 0, (tmp_path / "job.log").read_text()[-4000:]
    check(tmp_path, LINES)
    assert f"{LINES - BAD} results" in (tmp_path / "job.log").read_text()
    rack.simulated.rejoin(victim)


@pytest.mark.full
def test_a_killed_driver_is_resumed(rack: Rack, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", 60, 12)
    out = tmp_path / "out.jsonl"
    run = [sys.executable, "-m", "pomarium.cluster.cli.main", "batch", "run", str(tmp_path / "in.jsonl"), str(out)]
    log = (tmp_path / "driver.log").open("wb")
    driver = subprocess.Popen([*run, *OPTIONS], env=rack.environ, stdout=log, stderr=subprocess.STDOUT)
    until(lambda: answered(out) >= 3 or driver.poll() is not None, 200)
    psutil.Process(driver.pid).kill()
    driver.wait(10)
    before = answered(out)
    assert 3 <= before < 57, (tmp_path / "driver.log").read_text()[-4000:]
    done = subprocess.run([*run, *OPTIONS, "--resume"], env=rack.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "were answered before" in done.stdout
    check(tmp_path, 60)


def test_our_own_commands_submit_follow_and_cancel(rack: Rack, tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", 5, 2)

    def batch(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pomarium.cluster.cli.main", "batch", *arguments],
            env=rack.environ, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    name = batch("submit", "in.jsonl", "out.jsonl", *OPTIONS).split()[0]
    assert name in batch("status")
    batch("cancel", name)
    until(lambda: "STOPPED" in batch("status", name), 60)
    assert "log " in batch("logs", name)
    done = subprocess.run(
        [sys.executable, "-m", "pomarium.cluster.cli.main", "batch", "status", "nonesuch"],
        env=rack.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nonesuch" in done.stderr
