"""Fetches a model of Hugging Face in a process of its own, with a bar, after a look at the disk.

    fetch(name, stderr) --> python -m ...download NAME: room? hub.download; bar to stderr, folder or one sentence-->

In a process of its own, for huggingface_hub's threads do not end before their files are whole: so Ctrl-C ends it at
once. Files that are whole stay, and the next start goes on with the others.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from pomarium.cluster.machine import disk
from pomarium.cluster.machine.disk import DiskFullError
from pomarium.cluster.machine.units import format_size
from pomarium.worker.errors import CheckpointError, PomariumError
from pomarium.worker.models import hub, look_up

FAULTY = 3
NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
"""huggingface_hub's variable."""


def fetch(name: str, out: TextIO) -> Path:
    """The model's folder. The bar is shown on `out`, if that is a terminal.

    Raises:
        CheckpointError: there is no such model, it cannot be fetched, or the disk has no room for it; in one sentence.
    """
    environ = dict(os.environ) if out.isatty() else {**os.environ, NO_BARS: "1"}
    command = [sys.executable, "-m", "pomarium.cluster.replica.download", name]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out, env=environ, start_new_session=True
    )
    try:
        answer, _ = process.communicate()
    except BaseException:
        _end(process, name)
        raise
    if process.returncode == FAULTY:
        raise CheckpointError(answer.decode())
    if process.returncode:
        raise CheckpointError(f"The download of {name} ended with code {process.returncode}: try it again.")
    return Path(os.fsdecode(answer))


def _end(process: "subprocess.Popen[bytes]", name: str) -> None:
    """Kill it, and take away the parts of files that it was writing."""
    process.kill()
    process.wait()
    hub.remove_parts(name)


def require_room(name: str, size: int, free: int, folder: Path) -> None:
    """Raises DiskFullError if `size` bytes more leave less on the disk of `folder` than everything else there needs."""
    if size + disk.LEAST_FREE > free:
        raise DiskFullError(
            f"{name} takes {format_size(size)} more, and the disk of {folder} has {format_size(free)} free: make room, "
            "or set HF_HOME to a folder on another disk."
        )


def main(name: str) -> int:
    """Write the folder's path, or a sentence and return FAULTY."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print; stdout is for the answer
    try:
        look_up.look_up(name)
        size = hub.missing(name)
        require_room(name, size, disk.free(hub.cache()), hub.cache())
        folder = hub.download(name)
    except PomariumError as error:
        answer.write(str(error).encode())
        answer.flush()
        return FAULTY
    answer.write(os.fsencode(folder))
    answer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
