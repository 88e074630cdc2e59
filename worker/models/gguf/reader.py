"""The header of a GGUF file, read with every count and offset checked against the file's size.

    path --read_header--> GgufFile(metadata, tensors) ; GgufFile.raw(name) -> the tensor's bytes, mapped, not read

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Nothing is
allocated on the word of the file: each count is bounded first by the bytes that are left.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from pomarium.worker.errors import CheckpointError, UnsupportedError

Scalar = int | float | bool | str
Value = Scalar | list[int] | list[float] | list[bool] | list[str]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` is in row-major order (GGUF writes it reversed); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A parsed header and the mapped file behind it."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    data: mmap.mmap

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, uint8 (rows, bytes per row), a view of the mapped file."""
        tensor = self.tensors[name]
        view = np.frombuffer(self.data, np.uint8, tensor.nbytes, tensor.offset)
        return view.reshape(math.prod(tensor.shape[:-1]), -1)


class _Cursor:
    """Reads fields in order and raises CheckpointError where the file ends too early."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def require(self, nbytes: int) -> None:
        if nbytes > len(self.data) - self.position:
            raise CheckpointError(f"{self.path} is truncated or damaged: its header runs past the end of the file.")

    def scalar(self, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        self.require(size)
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += size
        return value  # type: ignore[no-any-return]

    def count(self, code: str, smallest_item: int) -> int:
        """A number of items that each take at least `smallest_item` bytes."""
        value = int(self.scalar(code))
        self.require(value * smallest_item)
        return value

    def string(self) -> str:
        length = self.count("Q", 1)
        text = self.data[self.position : self.position + length]
        self.position += length
        # Token pieces may be cut inside a character; the tokenizer never looks at such a string as text.
        return text.decode("utf-8", errors="replace")

    def value(self, key: str) -> Value:
        kind = int(self.scalar("I"))
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        raise CheckpointError(f"{self.path} is damaged: its key {key!r} has the unknown value type {kind}.")

    def array(self, key: str) -> list[str] | list[int] | list[float] | list[bool]:
        kind = int(self.scalar("I"))
        if kind == _STRING:
            return [self.string() for _ in range(self.count("Q", 8))]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is damaged: its key {key!r} is an array of unknown type {kind}.")
        dtype = np.dtype("<" + np.dtype(_SCALARS[kind]).str[1:])
        length = self.count("Q", dtype.itemsize)
        items = np.frombuffer(self.data, dtype, length, self.position)
        self.position += items.nbytes
        values: list[int] | list[float] | list[bool] = items.tolist()
        return values


def read_header(path: Path) -> GgufFile:
    """Parse `path` and check that every tensor lies inside the file.

    Raises:
        CheckpointError: no GGUF file, truncated or damaged.
        UnsupportedError: a version, byte order or tensor type that cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}.") from error
    cursor = _Cursor(path, data)
    _check_preamble(cursor)
    tensor_count = cursor.count("Q", 24)
    key_count = cursor.count("Q", 13)
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    return GgufFile(path, metadata, _place(path, infos, metadata, cursor.position, len(data)), data)


def _check_preamble(cursor: _Cursor) -> None:
    if cursor.data[:4] != b"GGUF":
        raise CheckpointError(f"{cursor.path} is not a GGUF file: it does not begin with the letters GGUF.")
    cursor.position = 4
    version = int(cursor.scalar("I"))
    if version not in (2, 3):
        raise UnsupportedError(
            f"{cursor.path} is of GGUF version {version}, or big-endian; only little-endian versions 2 and 3 are read."
        )


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    dimensions = cursor.count("I", 8)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{cursor.path} is damaged: tensor {name!r} has {dimensions} dimensions.")
    shape = tuple(int(cursor.scalar("Q")) for _ in range(dimensions))[::-1]
    kind = int(cursor.scalar("I"))
    offset = int(cursor.scalar("Q"))
    try:
        quantisation = GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedError(f"{cursor.path}: tensor {name!r} has the unknown GGML type {kind}.") from None
    items_per_block, bytes_per_block = GGML_QUANT_SIZES[quantisation]
    if 0 in shape or shape[-1] % items_per_block:
        raise CheckpointError(
            f"{cursor.path} is damaged: tensor {name!r} of shape {shape} cannot be of type {quantisation.name}."
        )
    nbytes = math.prod(shape) // items_per_block * bytes_per_block
    return TensorInfo(name, shape, quantisation, offset, nbytes)


def _place(
    path: Path, infos: list[TensorInfo], metadata: Mapping[str, Value], header_end: int, file_size: int
) -> dict[str, TensorInfo]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise CheckpointError(f"{path} is damaged: general.alignment is {alignment!r}.")
    start = math.ceil(header_end / alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    for info in infos:
        if start + info.offset + info.nbytes > file_size:
            raise CheckpointError(
                f"{path} is truncated: tensor {info.name!r} ends beyond the file's {file_size} bytes."
            )
        if info.name in placed:
            raise CheckpointError(f"{path} is damaged: tensor {info.name!r} occurs twice.")
        placed[info.name] = TensorInfo(info.name, info.shape, info.type, start + info.offset, info.nbytes)
    return placed
