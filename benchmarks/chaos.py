"""Kills, freezes and drains what a rack consists of, at random from a printed seed, while it answers.

    make chaos ARGS="--faults 200 --seed 7"

A simulated rack of three Macs serves the embedded model with two engines. In each round requests of all kinds are
answered while one thing is struck; each answer is compared with that of a quiet run before, and the rack has to be
healthy again, with nothing left running, before the next round. Ends with 1 if an answer is wrong, or
hangs, or is cut off by anything but the end of an ingress. Ray's head is not struck: nothing brings it back.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from answers_compared import CASES, COMPLETIONS, Asked, Case
from chaos_table import Kind, Round, Strike, Verdict, draw, table, verdict
from rack_serving import HEAL_S, Rack, command, serving

MODEL, TOKENS = "smollm2", 60
SERVE = ["--replicas", "2", "--stages", "1", "--tool-call-parser", "hermes"]
HUNG_S = 300.0
"""For an answer to end."""
SHOWN = 200
"""Characters of an answer that is not as it should be, its last ones."""
QUIET_S = 30.0
"""For engines to tell that nothing runs."""


def asked(rack: Rack, count: int) -> dict[str, Asked]:
    """So many requests, begun: those of CASES first."""
    cases = dict(list(CASES.items())[:count])
    for number in range(count - len(cases)):
        cases[f"chapter {number}"] = Case(
            COMPLETIONS, {"prompt": f"Chapter {number}.", "temperature": 0, "ignore_eos": True}
        )
    found = {name: Asked(rack.server.url, case, MODEL, TOKENS) for name, case in cases.items()}
    for one in found.values():
        one.start()
    for one in found.values():
        one.begun.wait(HUNG_S)
    return found


def chosen(things: Sequence[Any], strike: Strike) -> Any:
    """The one that is struck."""
    if not things:
        raise RuntimeError(f"there is nothing to strike: {strike}")
    return things[int(strike.engine * len(things))]


def cores(rack: Rack) -> list[psutil.Process]:
    """EngineCore hides its environment: it is a child of a replica's process that tracks no resources."""
    found = []
    for replica in rack.processes("ServeReplica:pomarium:engine"):
        with suppress(psutil.Error):
            found += [child for child in replica.children() if "resource_tracker" not in " ".join(child.cmdline())]
    return found


def strike_at(rack: Rack, strike: Strike) -> Callable[[], None]:
    """Strikes; how that is mended where it does not mend itself."""
    replicas = rack.status()["replicas"]
    mac = str(chosen(replicas, strike)["stages"][0]["mac"])
    pid = int(chosen(replicas, strike)["stages"][0]["pid"])
    time.sleep(strike.after_s)
    match strike.kind:
        case Kind.WORKER_KILLED:
            psutil.Process(pid).kill()
        case Kind.WORKER_FROZEN:
            psutil.Process(pid).send_signal(signal.SIGSTOP)
        case Kind.CORE_KILLED:
            chosen(cores(rack), strike).kill()
        case Kind.REPLICA_KILLED:
            chosen(rack.processes("ServeReplica:pomarium:engine"), strike).kill()
        case Kind.CONTROLLER_KILLED:
            chosen(rack.processes("ServeController"), strike).kill()
        case Kind.INGRESS_KILLED:
            chosen(rack.processes("ServeReplica:pomarium:ingress"), strike).kill()
        case Kind.MAC_DRAINED:
            command(rack.environ, "drain", mac)
            return lambda: print(command(rack.environ, "undrain", mac), end="")
        case Kind.MAC_KILLED:
            rack.simulated.kill(mac)
            return lambda: rack.simulated.rejoin(mac)
        case Kind.MAC_FROZEN:
            rack.simulated.freeze(mac)
            return lambda: _replace(rack, mac)
        case Kind.RAYLET_KILLED:
            (raylet,) = [process for process in _mac(rack, mac) if process.name() == "raylet"]
            raylet.kill()
            return lambda: _replace(rack, mac)
    return lambda: None


def _mac(rack: Rack, name: str) -> list[psutil.Process]:
    return [psutil.Process(pid) for one in rack.simulated.macs if one.name == name for pid in one.pids()]


def _replace(rack: Rack, mac: str) -> None:
    rack.simulated.kill(mac)
    rack.simulated.rejoin(mac)


def healthy(rack: Rack) -> bool:
    """Both engines serve, all Macs are there, and nothing runs or holds blocks."""
    if rack.health()[0] != 200:
        return False
    found = rack.status()
    replicas = found["replicas"]
    idle = all(not one["running"] and not one["waiting"] and not one["kv_use"] for one in replicas)
    return len(replicas) == 2 and idle and all(mac["alive"] for mac in found["macs"]) and not found["missing"]


def ended(one: Asked, expected: dict[str, Any]) -> Verdict:
    """What became of it."""
    one.join(HUNG_S)
    if one.is_alive():
        return Verdict.HUNG
    try:
        return verdict(one.answer, expected)
    except AssertionError as error:  # events whose numbers do not follow each other
        print(f"  {error}", flush=True)
        return Verdict.WRONG


def played(rack: Rack, strike: Strike, quiet: dict[str, Any]) -> Round:
    """One round."""
    running = asked(rack, len(quiet))
    began = time.monotonic()
    mend = strike_at(rack, strike)
    verdicts = {name: ended(one, quiet[name]) for name, one in running.items()}
    mend()
    rack.until(lambda: healthy(rack), HEAL_S)
    for name, found in verdicts.items():
        if found is not Verdict.ANSWERED:
            print(f"  {name}: {found}: {str(running[name].answer)[-SHOWN:]}", flush=True)
    return Round(strike.kind, tuple(verdicts.values()), time.monotonic() - began)


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="default: another each time")
    parser.add_argument("--faults", type=int, default=len(Kind), help="how many (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=20, help="at once (default: %(default)s)")
    parser.add_argument("--kind", action="append", choices=[str(kind) for kind in Kind], help="only this; repeatable")
    args = parser.parse_args()
    kinds = tuple(Kind(kind) for kind in args.kind or Kind)
    print(f"seed {args.seed}: {args.faults} faults, {args.requests} requests at once", flush=True)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="pmc", dir="/tmp") as name:
        folder = Path(name)
        with serving(folder, folder, ["--simulate", "3"], SERVE) as rack:
            rack.until(lambda: healthy(rack), HEAL_S)
            quiet = {key: one.answer for key, one in asked(rack, args.requests).items() if one.join(HUNG_S) is None}
            if faulty := {key: answer for key, answer in quiet.items() if "fault" in answer}:
                raise RuntimeError(f"without any fault of ours: {faulty}")
            rack.until(lambda: healthy(rack), QUIET_S)
            for number, strike in enumerate(draw(args.seed, args.faults, kinds), 1):
                print(f"{number}: {strike.kind}", flush=True)
                rounds.append(played(rack, strike, quiet))
                print(f"  healthy after {rounds[-1].healthy_s:.0f} s", flush=True)
    print("\n".join(table(rounds)))
    return 0 if all(one.faultless for one in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
