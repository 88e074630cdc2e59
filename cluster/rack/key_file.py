"""The rack's key on this machine: where it is kept, and where `rack join` looks for it."""

import getpass
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pomarium.cluster.rack.identity import RackKey
from pomarium.worker.errors import SettingsError
from pomarium.worker.home import home

KEY_VARIABLE = "POMARIUM_RACK_KEY"


def key_path(environ: Mapping[str, str]) -> Path:
    """XDG_CONFIG_HOME or ~/.config, and pomarium/rack.key in it."""
    return Path(environ.get("XDG_CONFIG_HOME") or home() / ".config") / "pomarium" / "rack.key"


def stored(environ: Mapping[str, str]) -> RackKey | None:
    """The key on file. Raises SettingsError: it cannot be read, or is damaged."""
    path = key_path(environ)
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SettingsError(f"The rack key {path} cannot be read: {error.strerror}.") from error
    try:
        return RackKey.parse(text)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error} Or delete the file, and `pomarium rack up` makes a new key.") from error


def store(key: RackKey, environ: Mapping[str, str]) -> None:
    """Write the key, for its owner only. Raises SettingsError."""
    path = key_path(environ)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(f"{key.text}\n")
    except OSError as error:
        raise SettingsError(
            f"The rack key {path} cannot be written ({error.strerror}): set XDG_CONFIG_HOME, or HOME, to a folder that "
            "you can write."
        ) from error


def made(environ: Mapping[str, str]) -> RackKey:
    """The key of a rack that begins here: the one on file, else a new one, which is then on file."""
    given = environ.get(KEY_VARIABLE)
    key = RackKey.parse(given) if given else stored(environ)
    if key is None:
        key = RackKey.generate()
        store(key, environ)
    return key


def known(option: str | None, environ: Mapping[str, str], ask: Callable[[str], str] | None = None) -> RackKey:
    """The key of a rack that is to be joined: --key, POMARIUM_RACK_KEY, the file, or what the user types.

    Args:
        ask: prompts on the terminal; None if there is no terminal.

    Raises:
        SettingsError: no key, or not one.
    """
    for text in (option, environ.get(KEY_VARIABLE)):
        if text:
            return RackKey.parse(text)
    if key := stored(environ):
        return key
    if ask is None:
        raise SettingsError(
            f"The rack's key is not known here: give it with --key or {KEY_VARIABLE}; `pomarium rack up` has shown it "
            "on the head."
        )
    return RackKey.parse(ask("Key of the rack (shown by `pomarium rack up` on the head): "))


def terminal() -> Callable[[str], str] | None:
    """Asks without echo where there is somebody to ask."""
    return getpass.getpass if sys.stdin.isatty() else None
