"""A `pomarium serve` process, driven as a terminal would drive it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

from pomarium.cluster.node import ports

MODEL = "smollm2"
CONTEXT = 1024
READY_S = 280.0
STOP_S = 60.0
MARKER = "POMARIUM_TEST_SERVER"
"""Inherited by every process of the server, so that what it leaves behind is found."""


@dataclass
class Server:
    """A server process in a session of its own, as a terminal would start it.

    Attributes:
        variables: of its environment beside this process's own; None: it has none of that name. key: for clients.
    """

    folder: Path
    arguments: list[str] = field(default_factory=list)
    variables: Mapping[str, str | None] = field(default_factory=dict)
    key: str = "none"
    process: "subprocess.Popen[bytes] | None" = None
    port: int = 0
    python: str = sys.executable

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def ensure(self, *models: str) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.port = ports.free(1)[0]
        self.start([*models, "--port", str(self.port), "--max-model-len", str(CONTEXT), *self.arguments])
        assert self.process is not None
        deadline = time.monotonic() + READY_S
        while "ready" not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output + self.log()
            time.sleep(0.2)

    def start(self, arguments: list[str]) -> "subprocess.Popen[bytes]":
        changed = {"XDG_STATE_HOME": str(self.folder), MARKER: str(self.folder), "RAY_ADDRESS": None, **self.variables}
        environ = {name: value for name, value in (os.environ | changed).items() if value is not None}
        with (self.folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [self.python, "-m", "pomarium.cluster.cli.main", "serve", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )
        return self.process

    def log(self) -> str:
        return "\n".join(p.read_text()[-4000:] for p in (self.folder / "pomarium").glob("*.log"))

    def interrupt(self) -> int:
        """Ctrl-C, which the terminal sends to the whole foreground group; returns the exit code."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_S)

    def end(self) -> None:
        """Ctrl-C if it runs; and nothing of it is left."""
        try:
            if self.process is not None and self.process.poll() is None:
                self.interrupt()
        finally:
            self.kill()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self) -> None:
        for process in self.processes():
            process.kill()
        if self.process is not None:
            self.process.wait(STOP_S)

    def generated(self) -> float:
        """Tokens that the engines have generated, by the metrics."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line for line in page.splitlines() if line.startswith("ray_vllm_generation_tokens_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
