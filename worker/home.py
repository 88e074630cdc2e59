"""The user's home folder, and paths that are written with one."""

from pathlib import Path

from pomarium.worker.errors import SettingsError


def home() -> Path:
    """HOME, or what the system's list of users says. Raises SettingsError if neither names a folder."""
    try:
        return Path.home()
    except RuntimeError:
        raise SettingsError(
            "HOME is not set, and the system knows no home folder of this user: set it to a folder that you can write."
        ) from None


def user_path(text: str) -> Path:
    """A path that a user typed, `~` and `~NAME` put in full. Raises SettingsError if there is no such home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise SettingsError(f"The home folder that {text!r} begins with is not known: write the whole path.") from None
