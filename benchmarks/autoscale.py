"""How long a rack that sleeps takes: from a request to its first token, from idle to asleep, and past a dead Mac.

    simulated rack, all asleep --pomarium serve --replicas 0-1--> request --> first token
         `--what the rack tells of its Macs (rack.power), the Macs' logs--> who took how long

    python benchmarks/autoscale.py [--rounds N] [--namespaces]

The Macs are processes of this machine: waking from a magic packet takes them no time, where a real Mac takes seconds,
and their nodes and engines share its cores. All else is what runs on real ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pomarium.cluster.autoscaling.setup import for_simulated
from pomarium.cluster.rack import current, netns, simulate
from pomarium.cluster.rack.identity import RackKey
from pomarium.cluster.rack.mac_power import MacPower, Power
from pomarium.cluster.rack.simulate import SimulatedRack, Simulation

IDLE_S, KEEP_S, DEADLINE_S = 6.0, 4.0, 15.0
PORT = 18231
BODY = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 8, "stream": True}
LONG_S = 300.0
REST = (Power.ASLEEP, Power.SET_ASIDE)


@dataclass(frozen=True)
class Wake:
    """One request to a rack asleep: Unix seconds.

    Attributes:
        asked: the request left. told: the provider began to wake a Mac. heard: its adapter heard the packet.
        joined: its node was seen. answered: the first token came.
    """

    asked: float
    told: float
    heard: float
    joined: float
    answered: float

    def parts(self) -> dict[str, float]:
        """Seconds of each part, and of all."""
        return {
            "request → a Mac is woken (Serve, plan, Ray's autoscaler)": self.told - self.asked,
            "→ its adapter hears the packet": self.heard - self.told,
            "→ its node has joined": self.joined - self.heard,
            "→ first token (workers, engine, model)": self.answered - self.joined,
            "request → first token": self.answered - self.asked,
        }


class Bench:
    """A rack with an endpoint, both of this process."""

    def __init__(self, rack: SimulatedRack, environ: dict[str, str], folder: Path) -> None:
        os.environ.update(rack.environment())
        from pomarium.cluster.rack import power_states, reports, roster

        self._power, self._rack, self._environ, self._folder = power_states, rack, environ, folder
        reports.use(roster.connect(rack.current.membership))

    @contextmanager
    def serving(self) -> Iterator[None]:
        """`pomarium serve`, with no engine at first."""
        command = [sys.executable, "-m", "pomarium.cluster.cli.main", "serve", "--port", str(PORT)]
        options = ["--replicas", "0-1", "--keep", f"{KEEP_S:g}s", "--max-model-len", "512"]
        output = self._folder / "serve.out"
        with output.open("wb") as file:
            server = subprocess.Popen([*command, *options], env=self._environ, stdout=file, stderr=file)
        try:
            self.until(lambda: "ready" in output.read_text())
            yield
        finally:
            server.terminate()
            server.wait(60)

    def until(self, found: Callable[[], Any]) -> Any:
        """What `found` gives once it is true."""
        deadline = time.monotonic() + LONG_S
        while not (value := found()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {LONG_S:g} s; Macs: {self._power.read_all()}")
            time.sleep(0.05)
        return value

    def macs(self) -> tuple[MacPower, ...]:
        """As the rack tells."""
        found: tuple[MacPower, ...] = self._power.read_all()
        return found

    def all_asleep(self) -> float:
        """When the last one fell asleep."""
        self.until(lambda: self.macs() and all(mac.state in REST for mac in self.macs()))
        return max(mac.since for mac in self.macs())

    def first_token(self) -> float:
        """Ask, and return when the first token came."""
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        with httpx.stream("POST", url, json=BODY, timeout=LONG_S, trust_env=False) as answer:
            answer.raise_for_status()
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data: ") and json.loads(line[6:])["choices"][0]["text"])
            came = time.time()
            for _ in lines:
                continue
        return came

    def wake(self) -> tuple[Wake, float]:
        """From all asleep to the first token, and from the last token to all asleep, in seconds."""
        self.all_asleep()
        asked = time.time()
        answered = self.first_token()
        ended = time.time()
        (mac,) = (mac for mac in self.macs() if mac.state is Power.AWAKE)
        log = self._log(mac.name)
        heard = max(at for at, line in log if line == "awake")
        told = self._told(mac.name)
        return Wake(asked, told, heard, mac.since, answered), self.all_asleep() - ended

    def past_a_dead_mac(self) -> float:
        """From a request that has a Mac without power woken first to its first token from another."""
        self.all_asleep()
        first = min(self.macs(), key=lambda mac: (mac.failures, mac.wakes, mac.name)).name
        self._rack.kill(first)
        asked = time.time()
        answered = self.first_token()
        self._rack.power_on(first)
        return answered - asked

    def _log(self, name: str) -> list[tuple[float, str]]:
        index = next(i for i, spec in enumerate(self._rack.current.nodes) if spec.name == name)
        lines = (self._rack.current.folder / f"{index}.mac" / "log").read_text().splitlines()
        return [(float(at), line) for at, _, line in (line.partition(" ") for line in lines)]

    def _told(self, name: str) -> float:
        """When the provider last began to wake the Mac: its log has local time in milliseconds."""
        log = self._rack.current.nodes[0].folder / "session_latest" / "logs" / "monitor.log"
        (*_, last) = (line for line in log.read_text().splitlines() if f"waking {name} as" in line)
        stamp, milliseconds = last[:23].split(",")
        return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000


@contextmanager
def sleeping_rack(namespaces: bool) -> Iterator[Bench]:
    """Three Macs, all asleep."""
    with tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp") as state:
        folder = Path(state)
        environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environ |= {"XDG_STATE_HOME": state, "XDG_CONFIG_HOME": state}

        link = netns.Link() if namespaces else None
        simulation = Simulation(3, link=link, sleep=IDLE_S, wake_deadline=DEADLINE_S)
        rack = simulate.start(simulation, RackKey.generate(), environ, prepare=for_simulated(folder))
        try:
            current.save(rack.current, environ)
            yield Bench(rack, environ, folder)
        finally:
            rack.down()


def row(name: str, seconds: Sequence[float]) -> str:
    """A line of the table."""
    return f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--namespaces", action="store_true", help="Macs in network namespaces (Linux, root)")
    options = parser.parse_args()
    with sleeping_rack(options.namespaces) as bench, bench.serving():
        wakes = [bench.wake() for _ in range(options.rounds)]
        dead = [bench.past_a_dead_mac() for _ in range(options.rounds)]
    print("| seconds | median | range |\n|---|--:|--:|")
    for name in wakes[0][0].parts():
        print(row(name, [wake.parts()[name] for wake, _ in wakes]))
    print(row(f"last token → all asleep (keep {KEEP_S:g} s, idle {IDLE_S:g} s)", [asleep for _, asleep in wakes]))
    print(row(f"request → first token, the first Mac dead (deadline {DEADLINE_S:g} s)", dead))


if __name__ == "__main__":
    main()
