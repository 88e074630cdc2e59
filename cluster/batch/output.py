"""The files that results are appended to: whole lines, soon, and whole again after whatever ended the job.

    lines --Appender.add--> buffer --every FLUSH_S, or FLUSH_BYTES--> file
    file of a job that was cut off --recover--> the whole lines it holds; a piece of a line at its end is dropped

A path is anything that fsspec opens. One that ends in .gz gets a gzip member for each flush, which every reader of gzip
takes for one file. Local files are synchronised to disk at each flush.
"""

import gzip
import io
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pomarium.worker.errors import PomariumError

FLUSH_S = 1.0
FLUSH_BYTES = 8 << 20
_READ = 1 << 20


class BatchFileError(PomariumError):
    """A file of a batch cannot be read or written; says which and why."""


@dataclass(frozen=True)
class Place:
    """Where a file lies.

    Attributes:
        name: as the user wrote it. system: fsspec's file system. path: within it.
    """

    name: str
    system: Any
    path: str

    @property
    def zipped(self) -> bool:
        """Whether it holds gzip."""
        return self.path.endswith(".gz")

    @property
    def local(self) -> bool:
        """Whether it is a file of this machine."""
        return isinstance(self.system, LocalFileSystem)


def place(name: str) -> Place:
    """Raises BatchFileError if fsspec knows no such file system."""
    try:
        system, path = fsspec.core.url_to_fs(name)
    except (ValueError, ImportError) as error:
        raise BatchFileError(f"{name} cannot be opened: {error}") from error
    return Place(name, system, path)


def lines(where: Place) -> Iterator[bytes]:
    """The lines of a file, each with its end; a gzip file is unpacked on the way.

    Raises:
        BatchFileError: it is not there, or cannot be read to its end.
    """
    try:
        with where.system.open(where.path, "rb") as raw:
            yield from gzip.GzipFile(fileobj=raw) if where.zipped else io.BufferedReader(raw, _READ)
    except FileNotFoundError:
        raise BatchFileError(f"There is no file {where.name}.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BatchFileError(f"{where.name} cannot be read: {error}.") from error


def recover(where: Place) -> None:
    """Drop what a job that was cut off left of a line, or of a gzip member, at the end of a file.

    Raises:
        BatchFileError: the file cannot be read or rewritten, or is damaged before its end.
    """
    if not where.system.exists(where.path):
        return
    size = where.system.size(where.path)
    whole = _whole_members(where) if where.zipped else _whole_lines(where, size)
    if whole == size:
        return
    try:
        if where.local:
            os.truncate(where.path, whole)
            return
        with where.system.open(where.path, "rb") as old, where.system.open(f"{where.path}.whole", "wb") as new:
            left = whole
            while left and (piece := old.read(min(left, _READ))):
                new.write(piece)
                left -= len(piece)
        where.system.mv(f"{where.path}.whole", where.path)
    except OSError as error:
        raise BatchFileError(f"{where.name} cannot be rewritten: {error}.") from error


def _whole_lines(where: Place, size: int) -> int:
    """Bytes up to the end of the last whole line."""
    with where.system.open(where.path, "rb") as file:
        at = size
        while at:
            start = max(0, at - _READ)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                return int(start + found + 1)
            at = start
    return 0


def _whole_members(where: Place) -> int:
    """Bytes up to the end of the last whole gzip member. A member holds whole lines."""
    whole = read = 0
    member = zlib.decompressobj(31)
    with where.system.open(where.path, "rb") as file:
        while piece := file.read(_READ):
            read += len(piece)
            while piece:
                try:
                    member.decompress(piece)
                except zlib.error as error:
                    raise BatchFileError(f"{where.name} is damaged behind byte {whole}: {error}.") from error
                if not member.eof:
                    break
                piece = member.unused_data
                whole = read - len(piece)
                member = zlib.decompressobj(31)
    return whole


class Appender:
    """Appends lines to one file.

    Attributes:
        written: lines that are in the file, of those that were added.
    """

    def __init__(self, where: Place) -> None:
        """Open the file, or make it. Raises BatchFileError if it cannot be written."""
        self._where = where
        self._held: list[bytes] = []
        self._size = 0
        self._last = time.monotonic()
        self.written = 0
        try:
            where.system.makedirs(where.system._parent(where.path), exist_ok=True)
            with where.system.open(where.path, "ab"):
                pass
        except (OSError, NotImplementedError, ValueError) as error:
            raise BatchFileError(f"{where.name} cannot be written: {error}.") from error

    def add(self, line: bytes) -> None:
        """Have `line`, which ends in a line break, written soon. Raises BatchFileError."""
        self._held.append(line)
        self._size += len(line)
        if self._size >= FLUSH_BYTES or time.monotonic() - self._last >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is held. Raises BatchFileError; what was written of a line is taken back then."""
        self._last = time.monotonic()
        if not self._held:
            return
        data = b"".join(self._held)
        try:
            self._append(gzip.compress(data, mtime=0) if self._where.zipped else data)
        except OSError as error:
            recover(self._where)
            raise BatchFileError(
                f"{self._where.name} cannot be written ({error.strerror or error}): make room and go on with --resume."
            ) from error
        self.written += len(self._held)
        self._held, self._size = [], 0

    def _append(self, data: bytes) -> None:
        with self._where.system.open(self._where.path, "ab") as file:
            file.write(data)
            if self._where.local:
                file.flush()
                os.fsync(file.fileno())


def custom_ids(where: Place) -> Iterator[tuple[str | None, int | None]]:
    """(custom_id, line of IN if it is told) of every line of a recovered OUT or ERRORS file.

    Raises:
        BatchFileError: a line is none of ours.
    """
    if not where.system.exists(where.path):
        return
    for number, text in enumerate(lines(where), 1):
        try:
            fields = json.loads(text)
            custom_id, line = fields["custom_id"], fields.get("line")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BatchFileError(f"{where.name}, line {number}, is no result of a batch ({error!r}).") from error
        if not isinstance(custom_id, str | None) or not isinstance(line, int | None):
            raise BatchFileError(f"{where.name}, line {number}, is no result of a batch (its custom_id or line).")
        yield custom_id, line


def errors_beside(out: str) -> str:
    """Where errors go if the user names no file: out.errors.jsonl beside out.jsonl."""
    name = out.removesuffix(".gz")
    ending = ".gz" if name != out else ""
    return f"{name.removesuffix('.jsonl')}.errors.jsonl{ending}"


def same_file(first: Place, second: Place) -> bool:
    """Whether both are one file."""
    if first.local and second.local:
        return Path(first.path).resolve() == Path(second.path).resolve()
    return (first.system, first.path) == (second.system, second.path)
