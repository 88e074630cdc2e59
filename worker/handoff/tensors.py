"""MLX arrays as bytes and back, without a change of dtype.

    {"hidden": mx.array} --pack--> Tensor (a view of the array's own memory) ... Tensor --unpack--> {"hidden": mx.array}

bf16 has no NumPy type: it travels as the 16-bit words that it is. `pack` is the one place where a step waits for the
device; the views keep their arrays alive, so that MLX does not write over them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx
import numpy as np

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.errors import TensorError


@dataclass(frozen=True)
class Tensor:
    """A named block of memory.

    Attributes:
        data: C-ordered elements, little-endian, as bytes: `nbytes` of them.
    """

    name: str
    dtype: "pb.DType"
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Expected:
    """What a receiver takes under one name.

    Attributes:
        shape: None for a dimension of any length, for example (None, 576) for rows of hidden states.
    """

    dtype: mx.Dtype
    shape: tuple[int | None, ...]

    def check(self, chunk: pb.Chunk) -> None:
        """Raises TensorError if the tensor announced by `chunk` is another."""
        announced = tuple(chunk.shape)
        fits = len(announced) == len(self.shape) and all(
            want in (None, is_) for want, is_ in zip(self.shape, announced, strict=True)
        )
        if chunk.dtype != _BY_MLX.get(self.dtype) or not fits:
            shape = tuple("any" if length is None else length for length in self.shape)
            raise TensorError(
                f"step {chunk.step}: {chunk.tensor} came as {dtype_name(chunk.dtype)}{list(announced)}, "
                f"but {self.dtype} of shape {shape} was agreed on"
            )


_BY_MLX: Mapping[mx.Dtype, "pb.DType"] = MappingProxyType(
    {mx.bfloat16: pb.BFLOAT16, mx.float16: pb.FLOAT16, mx.float32: pb.FLOAT32, mx.int32: pb.INT32}
)
_WORDS: Mapping[int, type[np.generic]] = MappingProxyType(
    {pb.BFLOAT16: np.uint16, pb.FLOAT16: np.float16, pb.FLOAT32: np.float32, pb.INT32: np.int32}
)
MAX_DIMENSIONS = 8


def dtype_name(dtype: int) -> str:
    """Name of a dtype for messages, of an unknown one too."""
    return pb.DType.Name(dtype).lower() if dtype in _WORDS else f"dtype {dtype}"


def tensor_bytes(dtype: int, shape: Sequence[int]) -> int:
    """Size of a tensor. Raises TensorError for a dtype or a number of dimensions that cannot be handed on."""
    if dtype not in _WORDS or len(shape) > MAX_DIMENSIONS:
        raise TensorError(f"{dtype_name(dtype)} with {len(shape)} dimensions cannot be handed on")
    return math.prod(shape) * np.dtype(_WORDS[dtype]).itemsize


def pack(arrays: Mapping[str, mx.array]) -> tuple[Tensor, ...]:
    """Evaluates all arrays at once and returns views of their memory. Raises TensorError for another dtype."""
    if not arrays:
        raise TensorError("a step without a tensor cannot be handed on")
    for name, array in arrays.items():
        if array.dtype not in _BY_MLX or array.ndim > MAX_DIMENSIONS:
            raise TensorError(f"{name}: {array.dtype} with {array.ndim} dimensions cannot be handed on")
    mx.eval(*arrays.values())
    return tuple(
        Tensor(name, _BY_MLX[array.dtype], tuple(array.shape), _bytes_of(array)) for name, array in arrays.items()
    )


def unpack(tensor: Tensor) -> mx.array:
    """The array of a tensor; its memory is copied, so that `tensor.data` may be used again."""
    words = np.frombuffer(tensor.data, _WORDS[tensor.dtype]).reshape(tensor.shape)
    array = mx.array(words)
    return array.view(mx.bfloat16) if tensor.dtype == pb.BFLOAT16 else array


def _bytes_of(array: mx.array) -> memoryview:
    if not array.size:
        return memoryview(b"")
    view = memoryview(array)  # type: ignore[arg-type]  # its stub lacks the buffer protocol
    if not view.c_contiguous:  # a transposed or strided array, which another evaluation lays out
        view = memoryview(mx.contiguous(array))  # type: ignore[arg-type]
    return view.cast("B")
