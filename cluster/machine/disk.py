"""Whether the disks that an engine needs have room, and the sentence for one that has none.

An engine writes little: logs, sockets, a page of notes on its faults. On a full disk Python and Ray fail at such writes
with words that name neither the disk nor its fullness ("No usable temporary directory found").
"""

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pomarium.cluster.machine.state import state_folder
from pomarium.cluster.machine.units import format_size
from pomarium.worker.errors import PomariumError

LEAST_FREE = 64 << 20
"""Bytes. Below it Ray's logs, which have no bound of our own, fill the rest within minutes."""


class DiskFullError(PomariumError):
    """A disk has no room; says which and how much it has."""


@dataclass(frozen=True)
class Room:
    """What is free, in bytes, on the disk of a folder. what: the folder, for people."""

    what: str
    folder: Path
    free: int


def shortage(rooms: Sequence[Room], least: int = LEAST_FREE) -> str | None:
    """One sentence on the disk that has the least room, if that is less than `least` bytes."""
    if not rooms or (tightest := min(rooms, key=lambda room: room.free)).free >= least:
        return None
    return (
        f"The disk of {tightest.folder} ({tightest.what}) is full: less than {format_size(least)} are free. Make room "
        "there."
    )


def ray_parent(environ: Mapping[str, str]) -> str:
    """In which a Ray of our own makes its folder."""
    return environ.get("RAY_TMPDIR") or "/tmp"


def rooms(ray_folder: str, environ: Mapping[str, str] = os.environ) -> tuple[Room, ...]:
    """Of the folders that an engine's processes write to."""
    state = state_folder(environ)
    folders = {"Ray's files": Path(ray_folder), "temporary files": temporary(environ), "logs": state}
    return tuple(Room(what, folder, free(folder)) for what, folder in folders.items())


def require(ray_folder: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises DiskFullError if one of the disks has no room."""
    if sentence := shortage(rooms(ray_folder, environ)):
        raise DiskFullError(sentence)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room, or of the user's share of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def temporary(environ: Mapping[str, str]) -> Path:
    """Where Python makes temporary files; `tempfile.gettempdir` itself fails on a full disk."""
    if tempfile.tempdir is not None:
        return Path(tempfile.tempdir)
    return Path(environ.get("TMPDIR") or environ.get("TEMP") or environ.get("TMP") or "/tmp")


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest one above it that there is: on the disk where it would be."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def free(folder: Path) -> int:
    """Bytes that this user may write on the disk of `folder`, or of the nearest folder above it that there is."""
    found = os.statvfs(nearest(folder))
    return found.f_bavail * found.f_frsize
