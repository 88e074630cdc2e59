"""A batch as a whole: engines are lost, jobs are cut off at random moments, and each line has one answer."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomarium.cluster.batch import dispatch, job
from pomarium.cluster.batch.dispatch import EngineLostError
from pomarium.cluster.batch.grouping import grouped
from pomarium.cluster.batch.job import Files, Job
from pomarium.cluster.batch.lines import Answer, Request, parse
from pomarium.cluster.batch.output import BatchFileError
from pomarium.cluster.batch.progress import Tally
from pomarium.worker.errors import PomariumError

REFUSED = "refuse"


def line(custom_id: str, prompt: str = "p", **changes: Any) -> str:
    body = {"prompt": prompt, "max_tokens": 1}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes})


@dataclass
class StubEngine:
    """Answers after some turns of the event loop; is lost at its `losses`-th requests, and starts again."""

    room: int = 3
    losses: frozenset[int] = frozenset()
    poison: str = "\0"
    random: Random = field(default_factory=lambda: Random(0))
    asked: list[str] = field(default_factory=list)
    starts: int = 0
    now: int = 0
    most: int = 0
    up: bool = False

    async def start(self) -> None:
        await asyncio.sleep(0)
        self.starts += 1
        self.up = True

    async def answer(self, request: Request) -> Answer:
        assert self.up, "asked before it was started"
        self.asked.append(request.custom_id)
        number, life = len(self.asked), self.starts
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(self.random.randint(1, 5)):
                await asyncio.sleep(0)
            if life == self.starts and (number in self.losses or request.custom_id == self.poison):
                self.up = False
            if life != self.starts or not self.up:
                raise EngineLostError("lost")
        finally:
            self.now -= 1
        if REFUSED in request.custom_id:
            return Answer(400, b'{"error": {"message": "no"}}')
        usage = {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
        return Answer(200, json.dumps({"id": "x", "usage": usage}).encode())


def write(folder: Path, several: Sequence[str]) -> Job:
    (folder / "in.jsonl").write_text("\n".join(several))
    return Job(str(folder / "in.jsonl"), str(folder / "out.jsonl"), str(folder / "errors.jsonl"))


def answer(asked: Job, engines: Sequence[StubEngine], cut: int | None = None) -> Tally:
    """Run a job, or let it be cut off after so many answers."""
    tally = Tally()

    class CutOffError(Exception):
        pass

    def moved() -> None:
        if cut is not None and tally.results + tally.errors >= cut:
            raise CutOffError

    try:
        with Files.open(asked) as files:
            asyncio.run(job.run(files, engines, tally, lambda: None, moved))
    except CutOffError:
        pass
    return tally


def ids(path: str) -> list[str | None]:
    return [json.loads(text)["custom_id"] for text in Path(path).read_text().splitlines()]


def numbers(path: str) -> list[int]:
    return [json.loads(text)["line"] for text in Path(path).read_text().splitlines()]


def test_every_line_is_answered_once(tmp_path: Path) -> None:
    several = [line(f"r{n}") for n in range(50)] + ["{broken", "", line("r7"), line("x", url="/v2"), line("a refuse")]
    asked = write(tmp_path, several)
    engines = [StubEngine(), StubEngine()]
    tally = answer(asked, engines)
    assert sorted(ids(asked.out), key=str) == sorted((f"r{n}" for n in range(50)), key=str)
    assert sorted(numbers(asked.errors)) == [51, 53, 54, 55], "blank lines count but are no errors"
    assert (tally.results, tally.errors, tally.prompt, tally.cached, tally.generated) == (50, 4, 200, 150, 100)
    assert all(engine.asked for engine in engines), "both engines work"
    assert all(engine.most <= engine.room for engine in engines), "an engine gets no more than it has room for"


@given(
    st.lists(st.frozensets(st.integers(1, 30), max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=4),
    st.integers(0, 60),
    st.integers(0, 1 << 32),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_kills_at_random_moments_lose_and_double_nothing(
    tmp_path_factory: pytest.TempPathFactory, losses: list[frozenset[int]], cuts: list[int], tail: int, seed: int
) -> None:
    """Engines are lost, the job is cut off, its files end in pieces of lines; --resume until all is answered."""
    random = Random(seed)
    folder = tmp_path_factory.mktemp("batch")
    several = [line(f"r{n}{' refuse' if n % 7 == 3 else ''}") for n in range(40)]
    several[5], several[9], several[20] = "{broken", line("r1"), line("r2", method="GET")
    asked = write(folder, several)
    with patch.object(dispatch, "MOST_LOSSES", 1000):
        for cut in cuts:
            answer(asked, [StubEngine(losses=each, random=random) for each in losses], cut)
            asked = Job(asked.source, asked.out, asked.errors, resume=True)
            with Path(asked.out).open("ab") as file:
                file.write(line("r39").encode()[:tail])
        answer(asked, [StubEngine(losses=each, random=random) for each in losses])
    answered = Counter(ids(asked.out))
    failed = Counter(numbers(asked.errors))
    assert set(answered.values()) | set(failed.values()) == {1}, "something is doubled"
    errors = {6, 10, 21} | {n + 1 for n in range(40) if n % 7 == 3 and n not in (5, 9, 20)}
    assert set(failed) == errors
    assert len(answered) == 40 - len(errors)


def test_a_request_that_ends_every_engine_is_given_up(tmp_path: Path) -> None:
    asked = write(tmp_path, [line(f"r{n}") for n in range(8)])
    engines = [StubEngine(poison="r3"), StubEngine(poison="r3")]
    answer(asked, engines)
    assert ids(asked.errors) == ["r3"]
    assert "engine that was asked was lost" in Path(asked.errors).read_text()
    assert sorted(ids(asked.out), key=str) == sorted(f"r{n}" for n in range(8) if n != 3)
    assert sum(engine.asked.count("r3") for engine in engines) == dispatch.MOST_LOSSES


def test_an_engine_that_does_not_start_ends_the_job(tmp_path: Path) -> None:
    class Refusing(StubEngine):
        async def start(self) -> None:
            raise PomariumError("2 stages need 2 Macs")

    with pytest.raises(PomariumError, match="2 stages need 2 Macs"):
        answer(write(tmp_path, [line("a")]), [Refusing()])


def test_results_of_before_are_kept_or_dropped_as_told(tmp_path: Path) -> None:
    asked = write(tmp_path, [line("a"), line("b")])
    answer(asked, [StubEngine()])
    with pytest.raises(BatchFileError, match=r"--resume.*--overwrite"):
        answer(asked, [StubEngine()])
    again = StubEngine()
    answer(Job(asked.source, asked.out, asked.errors, resume=True), [again])
    assert again.asked == []
    answer(Job(asked.source, asked.out, asked.errors, overwrite=True), [again])
    assert sorted(again.asked) == ["a", "b"]
    assert len(ids(asked.out)) == 2


def test_files_are_checked_before_anything_starts(tmp_path: Path) -> None:
    asked = write(tmp_path, [line("a")])
    with pytest.raises(BatchFileError, match="There is no file"):
        Files.open(Job(str(tmp_path / "none"), asked.out, asked.errors))
    with pytest.raises(BatchFileError, match="are one file"):
        Files.open(Job(asked.source, asked.source, asked.errors))


def test_a_disk_that_fills_up_ends_the_job_with_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = write(tmp_path, [line(f"r{n}") for n in range(5)])

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.Appender, "_append", full)
    with pytest.raises(BatchFileError, match=r"No space left.*--resume"):
        answer(asked, [StubEngine()])


def test_prompts_that_begin_alike_are_asked_one_after_another() -> None:
    several = [parse(n, line(f"{n}", prompt=f"document {n % 3}: question {n}").encode()) for n in range(1, 13)]
    requests = [asked for asked in several if isinstance(asked, Request)]
    ordered = list(grouped(requests))
    assert sorted(ordered, key=lambda r: r.line) == requests
    assert [int(r.custom_id) % 3 for r in ordered] == sorted(int(r.custom_id) % 3 for r in requests)
    windows = list(grouped(requests, window=4))
    assert [{r.line for r in windows[at : at + 4]} for at in (0, 4, 8)] == [
        {1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}
    ]  # fmt: skip
    assert list(grouped(requests, most_bytes=1)) == requests


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """What is held is a window and what is being asked, not the file."""
    held = []

    class Watching(StubEngine):
        async def answer(self, request: Request) -> Answer:
            held.append(request.line)
            return Answer(200, b"{}")

    asked = write(tmp_path, [line(f"r{n}") for n in range(9000)])
    read = []

    with Files.open(asked) as files:
        pending = files.ledger.pending

        def counting(several: Any) -> Any:
            for each in pending(several):
                read.append(len(held))
                yield each

        files.ledger.pending = counting  # type: ignore[method-assign]
        asyncio.run(job.run(files, [Watching()], Tally(), lambda: None, lambda: None))
    assert len(held) == 9000
    assert all(number - answered <= 4096 + 4 for number, answered in enumerate(read)), "read ahead of what is asked"
