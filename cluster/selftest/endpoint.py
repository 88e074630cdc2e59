"""The second step of serving: `pomarium serve` on this machine, asked over HTTP, and stopped.

What a user does next, so the command itself is run: a process with Ray, an engine and a worker. No rack is joined.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

import httpx

from pomarium.cluster.node import ports
from pomarium.worker.models.embedded import NAME
from pomarium.worker.selftest_rows import Begin, Event, Row, Verdict

CONTEXT, SEQUENCES = 1024, 8
ANSWER_S = 60.0
STOP_S = 45.0
TAIL_LINES = 8
PROMPT, ANSWER = "The capital of France is", " Paris"


def events() -> Iterator[Event]:
    """Rows of the start, of a completion, of a streamed chat and of the stop."""
    yield Begin("pomarium serve")
    server = _Server()
    try:
        yield server.ready()
        if server.runs:
            yield Begin("completion")
            yield _completion(server.url)
            yield Begin("streamed chat")
            yield _chat(server.url)
    finally:
        stopped = server.stop()
    if stopped is not None:
        yield stopped


class _Server:
    """The command's process."""

    def __init__(self) -> None:
        (port,) = ports.free(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "pomarium.cluster.cli.main", "serve", "--no-rack", "--port", str(port)]
        environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--max-model-len", str(CONTEXT), "--max-num-seqs", str(SEQUENCES)],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
        self._said: deque[str] = deque(maxlen=TAIL_LINES)
        self._turned = threading.Event()
        self._ready = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def runs(self) -> bool:
        """Whether it said that it is ready, and runs."""
        return self._ready and self._process.poll() is None

    def ready(self) -> Row:
        """Wait until it is, or has ended. The caller's caller bounds the time."""
        self._turned.wait()
        if self._ready:
            return Row("pomarium serve", Verdict.OK, f"ready after {time.monotonic() - self._began:.0f} s")
        return Row("pomarium serve", Verdict.FAILED, f"ended with {self._process.wait()}", tuple(self._said))

    def stop(self) -> Row | None:
        """As Ctrl-C does; None if it had ended."""
        if self._process.poll() is not None:
            return None
        began = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return Row("stop", Verdict.FAILED, f"not within {STOP_S:.0f} s of Ctrl-C", tuple(self._said))
        verdict = Verdict.OK if code == 0 else Verdict.FAILED
        return Row("stop", verdict, f"exit code {code} after {time.monotonic() - began:.0f} s")

    def _read(self) -> None:
        if self._process.stdout is None:
            raise ValueError("the process was started without a pipe")
        for line in self._process.stdout:
            if line.strip():
                self._said.append(line.rstrip())
            if re.match(r"ready +\d", line):
                self._ready = True
                self._turned.set()
        self._turned.set()


def _completion(url: str) -> Row:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    began = time.monotonic()
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S)
    seconds = time.monotonic() - began
    if response.status_code != 200:
        return Row("completion", Verdict.FAILED, f"HTTP {response.status_code}", (response.text[:500],))
    text = response.json()["choices"][0]["text"]
    verdict = Verdict.OK if text.startswith(ANSWER) else Verdict.WRONG
    return Row("completion", verdict, f"{PROMPT!r} -> {text!r}, {seconds:.1f} s")


def _chat(url: str) -> Row:
    message = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": NAME, "messages": [message], "max_tokens": 32, "temperature": 0, "stream": True}
    said: list[str] = []
    times: list[float] = []
    began = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=ANSWER_S) as response:
        if response.status_code != 200:
            return Row(
                "streamed chat", Verdict.FAILED, f"HTTP {response.status_code}", (response.read().decode()[:500],)
            )
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data.startswith("{") and (word := json.loads(data)["choices"][0]["delta"].get("content")):
                said.append(word)
                times.append(time.monotonic() - began)
    text = "".join(said)
    verdict = Verdict.OK if ANSWER.strip() in text and len(said) > 1 else Verdict.WRONG
    first = f", the first after {times[0]:.2f} s" if times else ""
    return Row("streamed chat", verdict, f"{text!r}: {len(said)} pieces{first}")
