"""Other Pomariums on this machine: installations that a shell or Python might take instead, and processes that serve.

PATH, sys.path, the process list --gather--> Neighbours
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path

import psutil

NAME = "pomarium"
_STAY = frozenset({"serve", "rack"})


@dataclass(frozen=True)
class Neighbours:
    """Attributes:
    commands: files named `pomarium` on PATH, in its order. packages: folders of sys.path with a distribution of it.
    serving: process ids of others of this machine's users that run `pomarium serve` or `pomarium rack`.
    """

    commands: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    serving: tuple[int, ...] = ()


def gather(environ: Mapping[str, str], path: Sequence[str] | None = None) -> Neighbours:
    """Look. path: instead of sys.path."""
    family = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    serving = [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "cmdline"])
        if process.info["pid"] not in family and stays(process.info["cmdline"] or ())
    ]
    found = distributions(name=NAME, path=list(sys.path if path is None else path))
    # What a build leaves in a checkout (.egg-info) is no installation: pip and uv write INSTALLER.
    packages = {str(Path(str(each.locate_file(""))).resolve()) for each in found if each.read_text("INSTALLER")}
    return Neighbours(on_path(environ.get("PATH", "")), tuple(sorted(packages)), tuple(sorted(serving)))


def on_path(path: str) -> tuple[str, ...]:
    """The different files that `pomarium` may mean, first the one that a shell takes."""
    files = [Path(folder) / NAME for folder in path.split(os.pathsep) if folder]
    return tuple(dict.fromkeys(str(file.resolve()) for file in files if os.access(file, os.X_OK) and file.is_file()))


def stays(command: Iterable[str]) -> bool:
    """Whether a process's command line is of `pomarium serve` or `pomarium rack ...`."""
    words = list(command)
    return any(
        (Path(word).name == NAME or word == "pomarium.cluster.cli.main") and following in _STAY
        for word, following in pairwise(words)
    )
