"""Starts Ray nodes of this machine, a few at a time, and waits until they are up.

    NodeSpecs --launch--> `ray start`, which ends when its node is up and leaves it in the background --bring_up--> up

`ray stop` is not used anywhere: it ends every Ray of the machine.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pomarium.cluster.node import head_keeper, kin, ray_node
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_node import NodeSpec
from pomarium.worker import local_network
from pomarium.worker.errors import PomariumError

START_S = 90.0
"""A node takes 3 s; longer only while the machine is busy."""
POLL_S = 0.1
ATTEMPTS = 3
IMPATIENCE = "Timed out waiting for file"
"""A node aborts unless its agents, which are Python programs, are up within 15 s; no setting changes that."""
LOG_NAME = "start.log"

Say = Callable[[str], None]
"""Told one line for people at each step."""


class NodeStartError(PomariumError):
    """A node did not start; says why."""


@dataclass(frozen=True)
class Start:
    """A node that is being started."""

    spec: NodeSpec
    process: "subprocess.Popen[bytes]"


def launch(spec: NodeSpec, membership: Membership, base: Mapping[str, str]) -> Start:
    """Begin to start a node, in a process group of its own that outlives this process."""
    shutil.rmtree(spec.folder, ignore_errors=True)  # a killed node leaves its sockets
    spec.folder.mkdir(mode=0o700, parents=True)
    with (spec.folder / LOG_NAME).open("wb") as log:
        process = subprocess.Popen(
            ray_node.command(spec, membership),
            env=ray_node.environment(spec, membership, base),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    kin.record(spec.folder, process.pid)
    return Start(spec, process)


def bring_up(specs: Sequence[NodeSpec], membership: Membership, base: Mapping[str, str], say: Say) -> None:
    """Start nodes, a few at a time, and tell of each that is up. Raises NodeStartError; others may be up by then."""
    together = os.cpu_count() or 1  # a start keeps a core busy
    for at in range(0, len(specs), together):
        starts = [launch(spec, membership, base) for spec in specs[at : at + together]]
        for start in starts:
            _await_up(start, membership, base)
            if start.spec.keeps:
                node = ray_node.kin_of(start.spec, membership.session)
                head_keeper.start(node, ray_node.environment(start.spec, membership, base))
            say(f"{start.spec.name} is up at {start.spec.address}")


def _await_up(start: Start, membership: Membership, base: Mapping[str, str]) -> None:
    """Return when the node is up, started again if Ray lost its patience. Raises NodeStartError, nothing left of it."""
    for attempt in range(1, ATTEMPTS + 1):
        reason = _fault(start)
        if reason is None:
            return
        reason = local_network.explained(reason, membership.address)
        kin.kill(ray_node.kin_of(start.spec, membership.session))
        if IMPATIENCE not in reason:
            raise NodeStartError(_sentence(start.spec, reason))
        if attempt < ATTEMPTS:
            start = launch(start.spec, membership, base)
    reason = f"{ATTEMPTS} times its agents took more than the 15 s that Ray allows, for the machine is too busy"
    raise NodeStartError(_sentence(start.spec, reason))


def _sentence(spec: NodeSpec, reason: str) -> str:
    return f"Ray's node {spec.name} at {spec.address} did not start: {reason}."


def _fault(start: Start) -> str | None:
    """Waits for the node; why it is not up, None if it is."""
    deadline = time.monotonic() + START_S
    while (code := start.process.poll()) is None:
        # `ray start` itself would wait 30 s for a node that has aborted.
        if reason := aborted(start.spec.folder):
            return reason
        if time.monotonic() > deadline:
            return f"it is not up after {START_S:g} s"
        time.sleep(POLL_S)
    if code == 0:
        return None
    return aborted(start.spec.folder) or last_line((start.spec.folder / LOG_NAME).read_text(errors="replace"))


def aborted(folder: Path) -> str | None:
    """What a node that aborted gave as its reason; None if it did not."""
    log = folder / "session_latest" / "logs" / "raylet.err"
    return check_failure(log.read_text(errors="replace")) if log.is_file() else None


def check_failure(log: str) -> str | None:
    """The failed check in what a node of Ray's wrote to its standard error."""
    match = re.search(r"Check failed: (.{1,300})", log)
    return match[1] if match else None


def last_line(log: str) -> str:
    """The last line of `ray start`'s output that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip(" -\t")]
    return f"Ray says: {lines[-1][:300].rstrip('.')}" if lines else "Ray says nothing"
