"""The client of benchmarks/endpoint.py, in a process of its own, as cheap as Python can be.

    Run, a line of JSON on stdin --> a connection for each stream, its requests one after the other
        each read of a socket --the time--> Answer      all answers --> Outcome, a line of JSON on stdout

What is read is not parsed: a read counts as an arrival if an event begins in it, and an answer has ended with the last
chunk of HTTP's. Tokens are counted by the usage that the last event tells, never by pieces.
"""

import asyncio
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from measure import percentile

OK = b"HTTP/1.1 200"
END = b"\r\n0\r\n\r\n"
TAIL = 2048
"""Bytes that hold the event with the usage and all that follows it."""
TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
END_S = 10.0


@dataclass(frozen=True)
class Run:
    """What is asked: of each stream so many requests, one after the other, of so many tokens each.

    Attributes:
        apart: seconds between the starts of two streams.
    """

    port: int
    model: str
    streams: int
    requests: int
    tokens: int
    timeout_s: float
    apart: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """All answers of a run. Seconds; p50 and p99 over requests (first), arrivals (gap).

    Attributes:
        tokens: generated, by the usages. wall: from the first request to the last answer's end.
        first: from the request to the first event. gap: between two arrivals of a stream.
        token, between: from a request's first event to its last, by its tokens and by its arrivals; the median.
        arrivals: reads that events came with. client: processor time of this process.
    """

    tokens: int
    wall: float
    first_p50: float
    first_p99: float
    gap_p50: float
    gap_p99: float
    token: float
    between: float
    arrivals: int
    client: float


@dataclass
class Answer:
    """One request's: when it was sent, when events arrived, and how many tokens it has in the end."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def span(self) -> float:
        """Seconds from the first event to the last."""
        return self.arrivals[-1] - self.arrivals[0]


class Stream(asyncio.Protocol):
    """A connection that sends its requests in turn; `done` has the answers."""

    def __init__(self, requests: Sequence[bytes], tokens: int) -> None:
        self._waiting, self._wanted = list(requests), tokens
        self._answers: list[Answer] = []
        self._tail = b""
        self.done: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def close(self) -> None:
        """Whatever is under way; nobody asks for its end."""
        self._transport.close()
        if not self.done.cancelled() and not self.done.cancel():
            self.done.exception()  # else asyncio tells of one that nobody has seen

    def data_received(self, data: bytes) -> None:
        """A read."""
        now = time.perf_counter()
        answer = self._answers[-1]
        if b"data: " in data:
            answer.arrivals.append(now)
        if not self._tail and not data.startswith(OK):
            self._fail(f"not answered: {data[:300]!r}")
        self._tail = (self._tail + data)[-TAIL:]
        if self._tail.endswith(END):
            self._end(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """In the middle of an answer, if it is not done."""
        self._fail(f"the connection was lost: {exc}")

    def _end(self, answer: Answer) -> None:
        told = TOKENS.findall(self._tail)
        answer.tokens = int(told[-1]) if told else 0
        if answer.tokens != self._wanted:
            self._fail(f"{answer.tokens} tokens came of {self._wanted}: {self._tail[-300:]!r}")
        else:
            self._next()

    def _next(self) -> None:
        self._tail = b""
        if self._waiting:
            self._answers.append(Answer(time.perf_counter()))
            self._transport.write(self._waiting.pop())
        elif not self.done.done():
            self.done.set_result(self._answers)
            self._transport.close()

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(reason))
            self._transport.close()


def request(run: Run, name: str) -> bytes:
    """One request with a prompt of its own."""
    body = {
        "model": run.model,
        "prompt": f"{name}: once upon a time there was a rack of Macs, and they",
        "max_tokens": run.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{run.port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


async def carry_out(run: Run, seed: int) -> Outcome:
    """All streams at once.

    Raises:
        RuntimeError: an answer is not whole.
        TimeoutError: not in time.
    """
    loop, used, began = asyncio.get_running_loop(), time.process_time(), time.perf_counter()
    streams: list[Stream] = []
    try:
        async with asyncio.timeout(run.timeout_s):
            for stream in range(run.streams):
                requests = [request(run, f"{seed} {stream} {number}") for number in range(run.requests)]
                _, made = await loop.create_connection(partial(Stream, requests, run.tokens), "127.0.0.1", run.port)
                streams.append(made)
                await asyncio.sleep(run.apart)
            answers = [answer for stream in streams for answer in await stream.done]
    finally:
        for made in streams:
            made.close()
    ended = time.perf_counter()
    return outcome(answers, ended - began, time.process_time() - used)


def outcome(answers: Sequence[Answer], wall: float, client: float) -> Outcome:
    """The figures of all answers."""
    first = [answer.arrivals[0] - answer.sent for answer in answers]
    gaps = [after - before for answer in answers for before, after in pairwise(answer.arrivals)] or [0.0]
    return Outcome(
        tokens=sum(answer.tokens for answer in answers),
        wall=wall,
        first_p50=percentile(first, 0.5),
        first_p99=percentile(first, 0.99),
        gap_p50=percentile(gaps, 0.5),
        gap_p99=percentile(gaps, 0.99),
        token=statistics.median(answer.span / max(1, answer.tokens - 1) for answer in answers),
        between=statistics.median(answer.span / max(1, len(answer.arrivals) - 1) for answer in answers),
        arrivals=sum(len(answer.arrivals) for answer in answers),
        client=client,
    )


class Client:
    """The process, from the benchmark's side."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, run: Run) -> Outcome:
        """Carry out a run. Raises RuntimeError with what the client says, if an answer is not whole."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(dataclasses.asdict(run)), file=self._process.stdin, flush=True)
        told: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"failed": "the client has ended"}')
        if "failed" in told:
            raise RuntimeError(told["failed"])
        return Outcome(**told)


@contextmanager
def client() -> Iterator[Client]:
    """A client's process, ended with the context."""
    command = [sys.executable, str(Path(__file__).resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield Client(process)
    finally:
        process.terminate()
        process.wait(END_S)


def main() -> None:
    """Runs from stdin, until it ends."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for seed, line in enumerate(sys.stdin):
            told: dict[str, Any]
            try:
                told = dataclasses.asdict(runner.run(carry_out(Run(**json.loads(line)), seed)))
            except (RuntimeError, OSError) as error:  # TimeoutError is an OSError
                told = {"failed": str(error) or repr(error)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
