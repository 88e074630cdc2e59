"""The endpoint's API keys from a file of its owner: neither the environment nor a process list shows what is in it.

file of mode 0600, a key a line --read--> keys
"""

from pathlib import Path

from pomarium.worker.errors import SettingsError

OTHERS = 0o077
"""Mode bits of a file that others can open."""


def read(path: Path) -> frozenset[str]:
    """The keys in the file, one a line; blank lines are skipped.

    Raises:
        SettingsError: it cannot be read, others could read it, or there is no key in it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = path.stat().st_mode
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(
            f"The API key file {path} cannot be read ({reason}): name a file with a key a line."
        ) from None
    if mode & OTHERS:
        raise SettingsError(f"The API key file {path} can be opened by others: run `chmod 600 {path}`.")
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not keys:
        raise SettingsError(f"The API key file {path} is empty: write a key into it.")
    return keys
