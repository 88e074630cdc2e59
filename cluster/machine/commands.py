"""What commands of the system say."""

import subprocess
from collections.abc import Sequence

COMMAND_S = 10.0


def said(command: Sequence[str]) -> str:
    """A command's stdout, "" if it cannot be run or says nothing in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
