"""Uploaded files and batches of the endpoint, as files in one folder: what survives a restart. No process is involved.

    <folder>/file-ID.json, file-ID          a StoredFile, and its content
    <folder>/batch_ID.json                  a Batch; `batch_ID.cancel` beside it asks for its end

Every record is written whole or not at all, by one writer: the ingress makes files and batches, the runner
(batch_runner.py) moves batches on. Objects are OpenAI's (Files and Batch API), as are the limits.
"""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, TypeVar

from pomarium.worker.errors import PomariumError

MOST_FILE_BYTES = 200 << 20
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}", re.ASCII)

Record = TypeVar("Record")


class UnknownIdError(PomariumError):
    """There is no such file or batch."""


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
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
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
        return StoredFile(**self._read(name, "file-"))

    def files(self) -> list[StoredFile]:
        """All, the latest first."""
        return self._all("file-", self.file, lambda file: (file.created_at, file.id))

    def content(self, name: str) -> Path:
        """Where a file's content lies. Raises UnknownIdError for what is no id."""
        return self._path(name, "file-")

    def delete_file(self, name: str) -> None:
        """Raises UnknownIdError."""
        self.file(name)
        (self.folder / f"{name}.json").unlink()
        self.content(name).unlink(missing_ok=True)

    def add_batch(self, batch: Batch) -> Batch:
        """Keep a new batch."""
        self.put_batch(batch)
        return batch

    def put_batch(self, batch: Batch) -> None:
        """Keep its present state."""
        self._write(batch.id, asdict(batch))

    def batch(self, name: str) -> Batch:
        """As it is, with its wanted end shown. Raises UnknownIdError."""
        fields = self._read(name, "batch_")
        counts, status = Counts(**fields.pop("counts")), State(fields.pop("status"))
        found = Batch(**fields, counts=counts, status=status)
        if self.cancel_wanted(name) and not found.status.over:
            return replace(found, status=State.CANCELLING)
        return found

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
            with contextlib.suppress(UnknownIdError):  # deleted meanwhile
                found.append(read(path.stem))
        return sorted(found, key=order, reverse=True)

    def _path(self, name: str, prefix: str) -> Path:
        if not _ID.fullmatch(name) or not name.startswith(prefix):
            raise UnknownIdError(f"There is no {'file' if prefix == 'file-' else 'batch'} {name!r}.")
        return self.folder / name

    def _read(self, name: str, prefix: str) -> dict[str, Any]:
        path = self._path(name, prefix)
        try:
            fields: dict[str, Any] = json.loads(path.with_name(f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnknownIdError(f"There is no {'file' if prefix == 'file-' else 'batch'} {name!r}.") from None
        return fields

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        temporary = self.folder / f".{name}-{secrets.token_hex(4)}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / f"{name}.json")


def new_id(prefix: str) -> str:
    """A new id of a file ("file-") or a batch ("batch_")."""
    return prefix + secrets.token_hex(12)
