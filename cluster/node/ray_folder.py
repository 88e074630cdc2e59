"""Where a Ray of this machine keeps its files: in a folder that only its owner enters."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pomarium.cluster.machine import disk
from pomarium.worker.errors import SettingsError

SOCKET_PATH_LIMIT = 103
"""Longest Unix socket path on macOS, in bytes (Linux: 107)."""

RAY_FOLDER = "0"
"""Ray's own, in the session's: Ray opens its folder, with all logs and sockets, to every user (mode 0777)."""

RAY_SOCKET_SUFFIX = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")


def new_session_folder(environ: Mapping[str, str]) -> Path:
    """A new folder of mode 0700, short enough for Ray's sockets in RAY_FOLDER.

    Raises:
        SettingsError: if RAY_TMPDIR is too long.
    """
    parent = disk.ray_parent(environ)
    os.makedirs(parent, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pm-", dir=parent))
    if len(str(folder / RAY_FOLDER)) + RAY_SOCKET_SUFFIX > SOCKET_PATH_LIMIT:
        folder.rmdir()
        raise SettingsError(
            f"RAY_TMPDIR {parent!r} is too long for Ray's sockets: choose a path of at most 20 characters."
        )
    return folder


def session_folder() -> str:
    """Of the Ray that this process is part of, which takes it with it when it ends."""
    import ray._private.worker as worker

    return str(worker._global_node.get_session_dir_path())
