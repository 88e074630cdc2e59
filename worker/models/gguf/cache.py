"""The cache folder of converted GGUF files: each is converted once, and two processes never collide.

converted(file, key) -> <cache>/pomarium/gguf/<key>/   complete or absent, because it is renamed into place
"""

import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pomarium.worker.errors import CheckpointError
from pomarium.worker.home import home
from pomarium.worker.models.gguf.convert import convert

CONVERTER_VERSION = 2
"""Raised whenever the converter writes something else or is given another `generation`, so that older results are not
used."""


def cache_folder() -> Path:
    """`pomarium` under XDG_CACHE_HOME (where it is absolute), else under the system's usual cache folder."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg) / "pomarium"
    usual = Path("Library/Caches") if sys.platform == "darwin" else Path(".cache")
    return home() / usual / "pomarium"


def converted(
    file: Path,
    key: str,
    check: Callable[[Path], None] | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """The mlx-lm directory made of the GGUF `file`, converted now if `key` is not in the cache yet.

    Args:
        check: called with `file` before it is converted; raises if the file is not to be trusted.
        generation: settings for generation_config.json beside the special tokens.

    Raises:
        CheckpointError: the file is damaged, or the cache folder cannot be written.
        SettingsError: there is no home folder, and XDG_CACHE_HOME is not set.
        UnsupportedError: the file's contents cannot be converted.
    """
    folder = cache_folder() / "gguf"
    target = folder / f"{key}-v{CONVERTER_VERSION}"
    try:
        if target.is_dir():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{target.name}.lock"):
            if not target.is_dir():
                if check is not None:
                    check(file)
                with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as temporary:
                    partial = Path(temporary) / target.name
                    partial.mkdir()
                    convert(file, partial, generation=generation)
                    partial.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be converted into the cache folder {folder}: {error}; make room or set XDG_CACHE_HOME."
        ) from error
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also if the process dies
        yield
