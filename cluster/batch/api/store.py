"""Uploaded files and batches of the endpoint, as files in one folder: what survives a restart. No process is involved.

    <folder>/file-ID.json, file-ID          a StoredFile, and its content
    <folder>/batch_ID.json                  a Batch; `batch_ID.cancel` beside it asks for its end

Every record is written whole or not at all, by one writer: the ingress makes files and batches, the runner
(runner.py) moves batches on. Objects are OpenAI's (Files and Batch API), as are the limits.

A record that cannot be read (a disk lost it, somebody edited it) stays where it is and is left out of lists, with one
log line; all others go on. The result files of a batch have names before they exist, so that a restart goes on from
them; clients are told those that exist, once the batch is over.
"""

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import IO, Any, TypeVar

from pomarium.cluster.batch.lines import shown
from pomarium.worker.errors import PomariumError

MOST_FILE_BYTES = 200 << 20
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}", re.ASCII)

logger = logging.getLogger(__name__)

Record = TypeVar("Record")

_Kinds = dict[str, type | UnionType]
_FILE: _Kinds = {"id": str, "bytes": int, "created_at": int, "filename": str, "purpose": str}
_BATCH: _Kinds = {
    "id": str, "endpoint": str, "input_file_id": str, "completion_window": str, "created_at": int, "status": str,
    "output_file_id": str | None, "error_file_id": str | None, "metadata": dict | None, "counts": dict, "times": dict,
    "error": str | None,
}  # fmt: skip
_COUNTS: _Kinds = {"total": int, "completed": int, "failed": int}
"""Of the fields of a record, as JSON has them."""


class UnknownIdError(PomariumError):
    """There is no such file or batch."""


class DamagedRecordError(UnknownIdError):
    """What is kept of a file or batch cannot be read."""


class FileTooLargeError(PomariumError):
    """An upload is over MOST_FILE_BYTES."""


class State(StrEnum):
    """Of a batch."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether nothing follows it."""
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class StoredFile:
    """Attributes:
    created_at: Unix time in seconds. purpose: "batch", or "batch_output" of results.
    """

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def card(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"object": "file", "status": "processed", **asdict(self)}


@dataclass(frozen=True)
class Counts:
    """Of a batch's lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Batch:
    """Attributes:
    times: state -> Unix time in seconds at which it was entered. error: why it failed, one sentence.
    output_file_id, error_file_id: of its results; as long as it is not over there may be no such files.
    """

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: State = State.VALIDATING
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, str] | None = None
    counts: Counts = field(default_factory=Counts)
    times: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def card(self) -> dict[str, Any]:
        """OpenAI's object."""
        names = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled")
        problem = {"object": "list", "data": [{"code": "failed", "message": self.error, "line": None, "param": None}]}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.error is None else problem,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file_id if self.status.over else None,
            "error_file_id": self.error_file_id if self.status.over else None,
            "created_at": self.created_at,
            "expires_at": None,
            "expired_at": None,
            "request_counts": asdict(self.counts),
            "metadata": self.metadata,
        } | {f"{name}_at": self.times.get(name) for name in names}

    def entered(self, status: State) -> "Batch":
        """The batch in another state, from now on."""
        return replace(self, status=status, times={**self.times, status.value: int(time.time())})


class BatchStore:
    """The `folder`. Used by any number of processes, each record by one writer."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made if need be."""
        self.folder = folder
        self._told: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add_file(self, filename: str, purpose: str, source: IO[bytes]) -> StoredFile:
        """Keep a copy of `source`. Raises FileTooLargeError."""
        name = new_id("file-")
        path = self.folder / name
        try:
            with path.open("wb") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
                    if target.tell() > MOST_FILE_BYTES:
                        raise FileTooLargeError(f"A file may have {MOST_FILE_BYTES >> 20} MiB.")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return self.register_file(name, filename, purpose)

    def register_file(self, name: str, filename: str, purpose: str) -> StoredFile:
        """Make a file of the content that lies at `content(name)`."""
        size = (self.folder / name).stat().st_size
        file = StoredFile(name, size, int(time.time()), filename, purpose)
        self._write(name, asdict(file))
        return file

    def file(self, name: str) -> StoredFile:
        """Raises UnknownIdError."""
        try:
            return StoredFile(**self._read(name, "file-", _FILE))
        except TypeError as error:
            raise _damaged(name, error) from None

    def files(self) -> list[StoredFile]:
        """All, the latest first."""
        return self._all("file-", self.file, lambda file: (file.created_at, file.id))

    def content(self, name: str) -> Path:
        """Where a file's content lies. Raises UnknownIdError for what is no id."""
        return self._path(name, "file-")

    def delete_file(self, name: str) -> None:
        """Also one whose record is damaged. Raises UnknownIdError."""
        content = self.content(name)
        try:
            (self.folder / f"{name}.json").unlink()
        except FileNotFoundError:
            raise _unknown(name, "file-") from None
        content.unlink(missing_ok=True)

    def add_batch(self, batch: Batch) -> Batch:
        """Keep a new batch."""
        self.put_batch(batch)
        return batch

    def put_batch(self, batch: Batch) -> None:
        """Keep its present state."""
        self._write(batch.id, asdict(batch))

    def batch(self, name: str) -> Batch:
        """As it is, with its wanted end shown. Raises UnknownIdError."""
        try:
            known = self._read(name, "batch_", _BATCH)
            known["counts"] = Counts(**_known(known["counts"], _COUNTS))
            found = Batch(**known | {"status": State(known["status"])})
            _check_values(found.metadata or {}, str)
            _check_values(found.times, int)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(name, error) from None
        if not found.status.over:
            return replace(found, status=State.CANCELLING) if self.cancel_wanted(name) else found
        output, errors = (self._existing(file) for file in (found.output_file_id, found.error_file_id))
        return replace(found, output_file_id=output, error_file_id=errors)

    def batches(self, but: Collection[str] = ()) -> list[Batch]:
        """All `but` those of these ids, the latest first."""
        return self._all("batch_", self.batch, lambda batch: (batch.created_at, batch.id), but)

    def cancel(self, name: str) -> Batch:
        """Ask for its end. Raises UnknownIdError."""
        if not self.batch(name).status.over:
            (self.folder / f"{name}.cancel").touch()
        return self.batch(name)

    def cancel_wanted(self, name: str) -> bool:
        """Whether somebody asked for its end."""
        return (self.folder / f"{name}.cancel").exists()

    def _all(
        self, prefix: str, read: Callable[[str], Record], order: Callable[[Record], Any], but: Collection[str] = ()
    ) -> list[Record]:
        found = []
        for path in (path for path in self.folder.glob(f"{prefix}*.json") if path.stem not in but):
            try:
                found.append(read(path.stem))
            except DamagedRecordError as error:
                if path.stem not in self._told:
                    logger.error("%s It is left out of lists: mend or delete %s.", error, path)
                    self._told.add(path.stem)
            except UnknownIdError:  # deleted meanwhile
                continue
        return sorted(found, key=order, reverse=True)

    def _existing(self, name: str | None) -> str | None:
        return name if name is not None and (self.folder / f"{name}.json").exists() else None

    def _path(self, name: str, prefix: str) -> Path:
        if not _ID.fullmatch(name) or not name.startswith(prefix):
            raise _unknown(name, prefix)
        return self.folder / name

    def _read(self, name: str, prefix: str, kinds: _Kinds) -> dict[str, Any]:
        path = self._path(name, prefix)
        try:
            known = _known(json.loads(path.with_name(f"{name}.json").read_bytes()), kinds)
        except FileNotFoundError:
            raise _unknown(name, prefix) from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise _damaged(name, error) from error
        if known.get("id") != name:
            raise _damaged(name, ValueError(f"it is that of {shown(known.get('id'))}"))
        return known

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        temporary = self.folder / f".{name}-{secrets.token_hex(4)}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / f"{name}.json")


def _unknown(name: str, prefix: str) -> UnknownIdError:
    return UnknownIdError(f"There is no {'file' if prefix == 'file-' else 'batch'} {shown(name)}.")


def _damaged(name: str, error: Exception) -> DamagedRecordError:
    return DamagedRecordError(f"The record of {name} cannot be read ({error}).")


def _known(fields: object, kinds: _Kinds) -> dict[str, Any]:
    """The `fields` that `kinds` names, which are as it says. Raises TypeError."""
    if not isinstance(fields, dict):
        raise TypeError(f"{shown(fields)} is no object")
    for key, kind in kinds.items():
        if key in fields and not isinstance(fields[key], kind):
            raise TypeError(f"its {key} is {shown(fields[key])}")
    return {key: fields[key] for key in kinds if key in fields}


def _check_values(fields: dict[str, Any], kind: type) -> None:
    if wrong := [value for value in fields.values() if not isinstance(value, kind)]:
        raise TypeError(f"it holds {shown(wrong[0])}")


def new_id(prefix: str) -> str:
    """A new id of a file ("file-") or a batch ("batch_")."""
    return prefix + secrets.token_hex(12)
