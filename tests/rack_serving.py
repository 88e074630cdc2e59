"""A simulated rack with a `pomarium serve` on it, and what tests do with both: processes of their own, real sockets."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI
from serve_process import Server

from pomarium.cluster.rack import current
from pomarium.cluster.rack.simulate import SimulatedRack

HEAL_S = 240.0
"""Several starts of an engine on a machine of two cores."""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Rack:
    """The rack and the server on it."""

    server: Server
    simulated: SimulatedRack
    environ: dict[str, str]

    def client(self) -> OpenAI:
        return self.server.client()

    def health(self) -> tuple[int, str]:
        try:
            answer = httpx.get(f"{self.server.url}/health", timeout=5)
        except httpx.HTTPError as error:
            return 0, repr(error)
        return answer.status_code, answer.text

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(command(self.environ, "status", "--json"))
        return found

    def until(self, found: Callable[[], Any], seconds: float) -> Any:
        """As the function; a failure tells how the rack was."""
        return until(found, seconds, self.describe)

    def describe(self) -> str:
        """Health, members, and what the server has logged of late."""
        return f"health {self.health()}\nstatus {json.dumps(self.status())}\nlog ... {self.server.log()[-3000:]}"

    def processes(self, name: str) -> list[psutil.Process]:
        """Of the rack, by what stands in their command lines, in the order of their numbers."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("XDG_STATE_HOME") == self.environ["XDG_STATE_HOME"]
                if ours and name in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def stages(self) -> list[dict[str, Any]]:
        """Of the one replica, once it has reported."""
        replicas = self.until(lambda: self.status()["replicas"], 60)
        stages: list[dict[str, Any]] = replicas[0]["stages"]
        return stages


def command(environ: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pomarium.cluster.cli.main", "rack", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.stdout


def until(found: Callable[[], Any], seconds: float, describe: Callable[[], str] = str) -> Any:
    """What `found` gives, once it is true; a failure quotes `describe`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not in time: {describe()}"
        time.sleep(0.5)
    return value


@contextmanager
def serving(state: Path, config: Path, up: Sequence[str], serve: Sequence[str], **variables: str) -> Iterator[Rack]:
    """`rack up` and `serve` with these arguments; both are ended with the context.

    Args:
        state, config: folders for what they write. variables: of the environment.
    """
    environ = environment(state, config) | variables
    try:
        command(environ, "up", *up)
        with served(environ, state, serve) as rack:
            yield rack
    finally:
        command(environ, "down")
    assert current.recorded(environ) is None


@contextmanager
def served(environ: dict[str, str], state: Path, serve: Sequence[str]) -> Iterator[Rack]:
    """`serve` with these arguments on the rack that is up; it is ended with the context."""
    server = Server(state, list(serve))
    try:
        server.ensure()
        yield Rack(server, simulated(environ), environ)
    finally:
        server.end()


def environment(state: Path, config: Path) -> dict[str, str]:
    """Of commands that start a rack of their own."""
    environ = os.environ | {"XDG_STATE_HOME": str(state), "XDG_CONFIG_HOME": str(config)}
    environ.pop("RAY_ADDRESS", None)
    return environ


def simulated(environ: dict[str, str]) -> SimulatedRack:
    """The one that is up."""
    recorded = current.current(environ)
    assert recorded is not None
    return SimulatedRack(recorded, environ)


@dataclass
class SharedRack:
    """A simulated rack that several modules serve from, one after the other (sharing.py). folder: its own."""

    folder: Path
    macs: int

    @property
    def environ(self) -> dict[str, str]:
        return environment(self.folder, self.folder)

    def ensure(self) -> SimulatedRack:
        """It runs, with all its Macs."""
        if current.current(self.environ) is None:
            command(self.environ, "up", "--simulate", str(self.macs))
        rack = simulated(self.environ)
        assert all(mac.pids() for mac in rack.macs), "a module left the rack without one of its Macs"
        return rack

    def end(self) -> None:
        command(self.environ, "down")


def answer(rack: Rack) -> str:
    done = rack.client().chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=16)
    return done.choices[0].message.content or ""


def served_again(rack: Rack) -> None:
    rack.until(lambda: rack.health()[0] == 200, HEAL_S)
    assert "Paris" in answer(rack)
