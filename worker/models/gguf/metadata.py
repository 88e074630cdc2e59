"""Typed access to a GGUF file's metadata: the value, or one sentence that says which key is missing or wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.gguf.reader import Value

T = TypeVar("T", int, float, str, bool)


@dataclass(frozen=True)
class Metadata:
    """`path` is named in errors; keys given to `architecture_*` are prefixed with the file's architecture."""

    path: Path
    values: Mapping[str, Value]

    @property
    def architecture(self) -> str:
        return self.required("general.architecture", str)

    def own(self, key: str) -> str:
        """The full name of an architecture-specific key: `llama.block_count` for "block_count"."""
        return f"{self.architecture}.{key}"

    def optional(self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            return kind(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: its key {key!r} should be one {kind.__name__}.")
        return value

    def required(self, key: str, kind: type[T]) -> T:
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path} is incomplete: the key {key!r} is missing.")
        return value

    def positive(self, key: str) -> int:
        value = self.required(key, int)
        if value <= 0:
            raise CheckpointError(f"{self.path}: its key {key!r} is {value}, which is not a positive number.")
        return value

    def listed(self, key: str, kind: type[T]) -> list[T] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise CheckpointError(f"{self.path}: its key {key!r} should be a list of {kind.__name__}.")
        return value  # type: ignore[return-value]
