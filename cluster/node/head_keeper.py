"""Starts the process of Ray's head (GCS) again when it ends alone: what it knew is on disk (`rack up --keep-state`).

    starting.bring_up: a head that keeps its state --start--> this process --looks each LOOK_S--> gcs_server is gone,
        the node's raylet lives --> the same command line once more: it reads its folder, and nodes connect again

Ray's nodes and processes wait for their head for a minute (gcs_rpc_server_reconnect_timeout_s); what runs goes on
meanwhile. The process belongs to the node: it has its marker, is ended with it, and ends when the node's raylet has.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pomarium.cluster.node import kin
from pomarium.cluster.node.kin import Kin

LOOK_S = 0.5
SETTLE_S = 0.5
"""A node that ends as a whole loses its processes one after the other."""
SHORT_S, MOST_SHORT = 10.0, 5
"""After so many lives in a row that were this short it is given up."""
MODULE = "pomarium.cluster.node.head_keeper"
LOG_NAME = "head-keeper.log"
GCS, RAYLET = "gcs_server", "raylet"


@dataclass(frozen=True)
class Command:
    """How a process was started."""

    line: Sequence[str]
    environ: Mapping[str, str]
    folder: str


@dataclass(frozen=True)
class Head:
    """A node's processes GCS and RAYLET, and how the first was started."""

    gcs: psutil.Process
    raylet: psutil.Process
    command: Command


def start(node: Kin, environ: Mapping[str, str]) -> None:
    """Keep the head of a node that is up, from now on, in a process of its own.

    Args:
        environ: of that process.
    """
    with (node.folder / LOG_NAME).open("wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", MODULE, node.variable, node.value, str(node.folder)],
            env={**environ, node.variable: node.value},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def head_of(node: Kin) -> Head:
    """Of a node that is up. Raises KeyError or psutil.Error if it is not."""
    found = {process.name(): process for process in kin.members(node) if process.name() in (GCS, RAYLET)}
    gcs = found[GCS]
    return Head(gcs, found[RAYLET], Command(gcs.cmdline(), gcs.environ(), gcs.cwd()))


def keep(head: Head, launch: Callable[[Command], psutil.Process]) -> None:
    """Until the node has ended, or its head ends again and again.

    Args:
        launch: starts the command once more.
    """
    gcs, raylet = head.gcs, head.raylet
    short, began = 0, time.monotonic()
    while lives(raylet):
        time.sleep(LOOK_S)
        if lives(gcs):
            continue
        time.sleep(SETTLE_S)
        if not lives(raylet):
            return
        short = short + 1 if time.monotonic() - began < SHORT_S else 0
        if short >= MOST_SHORT:
            print(f"Ray's head process ended {short} times within {SHORT_S:g} s: it is given up.", flush=True)
            return
        print(f"{time.strftime('%H:%M:%S')} Ray's head process has ended, and is started again", flush=True)
        gcs, began = launch(head.command), time.monotonic()


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def launched(command: Command) -> psutil.Process:
    """The command once more; Ray's processes write their own logs."""
    process = subprocess.Popen(
        command.line,
        env=dict(command.environ),
        cwd=command.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return psutil.Process(process.pid)


if __name__ == "__main__":
    keep(head_of(Kin(sys.argv[1], sys.argv[2], Path(sys.argv[3]))), launched)
