"""Where this machine keeps what outlives a command: logs, the rack that it is part of, its certificate."""

from collections.abc import Mapping
from pathlib import Path


def state_folder(environ: Mapping[str, str]) -> Path:
    """XDG_STATE_HOME or ~/.local/state, and `pomarium` in it (XDG Base Directory Specification)."""
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "pomarium"
