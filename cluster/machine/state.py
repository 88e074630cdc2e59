"""Where this machine keeps what outlives a command: logs, the rack that it is part of, its certificate."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from pomarium.worker.errors import SettingsError
from pomarium.worker.home import home


def state_folder(environ: Mapping[str, str]) -> Path:
    """XDG_STATE_HOME or ~/.local/state, and `pomarium` in it (XDG Base Directory Specification).

    Raises:
        SettingsError: neither variable names a folder.
    """
    return Path(environ.get("XDG_STATE_HOME") or home() / ".local" / "state") / "pomarium"


def made(folder: Path) -> Path:
    """`folder`, `state_folder` or one within it, made if need be. Raises SettingsError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def unwritable(path: Path, error: OSError) -> SettingsError:
    """Why `path`, in `state_folder`, could not be made or written."""
    return SettingsError(
        f"{path} cannot be written ({error.strerror}): set XDG_STATE_HOME, or HOME, to a folder that you can write."
    )


def fault_of(folder: Path) -> str | None:
    """Why nothing can be written into `folder` or, as long as there is none, beside it; None if it can.

    A file is made and removed at once.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)
