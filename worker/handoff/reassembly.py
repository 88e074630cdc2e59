"""The receiver's half of a link, without sockets: chunks in, whole steps out, exactly once and in order.

    Hello --begin--> (Accepted)      Chunk, payload --add--> nothing, or a whole step --> stage --consume--> credit

A chunk seen before is dropped, whatever it says; every other must be the very next one and fit what its tensor
announced, or the link is refused. Payloads are written straight into the tensor's own buffer.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.errors import (
    CreditError,
    EpochError,
    GapError,
    MalformedFrameError,
    SessionError,
    StepError,
    TensorError,
)
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.tensors import Expected, Tensor, dtype_name, tensor_bytes
from pomarium.worker.handoff.window import cost

MAX_TENSORS = 64
"""Tensors of one step."""


@dataclass(frozen=True)
class Step:
    """A whole step.

    Attributes:
        cost: what it took from the window.
    """

    step: int
    tensors: tuple[Tensor, ...]
    cost: int


class _Building:
    """A tensor of which chunks are still to come."""

    def __init__(self, first: pb.Chunk, buffer: memoryview) -> None:
        self.first, self.buffer = first, buffer
        self.filled = self.chunks = 0

    def add(self, chunk: pb.Chunk, payload: memoryview) -> None:
        first = self.first
        if (chunk.index, chunk.count, chunk.tensor, chunk.dtype) != (
            self.chunks, first.count, first.tensor, first.dtype,
        ) or chunk.shape != first.shape:  # fmt: skip
            raise TensorError(f"{_name(chunk)}: chunk {self.chunks} of {first.count} of {_name(first)} was due")
        end = self.filled + len(payload)
        left, more = len(self.buffer) - end, chunk.index + 1 < chunk.count
        if left < 0 or (left == 0) == more or (more and not payload):
            raise TensorError(
                f"{_name(chunk)}: the chunks have another size than its shape says, {len(self.buffer)} bytes"
            )
        self.buffer[self.filled : end] = payload
        self.filled, self.chunks = end, chunk.index + 1

    @property
    def whole(self) -> bool:
        return self.chunks == self.first.count

    def tensor(self) -> Tensor:
        return Tensor(self.first.tensor, self.first.dtype, tuple(self.first.shape), self.buffer)


class _Buffers:
    """Memory of tensors that were taken out, for the next ones: fresh memory costs more to touch than to fill."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._free: deque[memoryview] = deque()  # the oldest first

    def take(self, nbytes: int) -> memoryview:
        for index, buffer in enumerate(self._free):
            if len(buffer) == nbytes:
                del self._free[index]
                self._held -= nbytes
                return buffer
        return np.empty(nbytes, np.uint8).data

    def give_back(self, buffer: memoryview) -> None:
        self._free.append(buffer)
        self._held += len(buffer)
        while self._held > self._limit or len(self._free) > MAX_TENSORS:
            self._held -= len(self._free.popleft())


class Reassembler:
    """What has come of one peer's steps. Not thread-safe; of no use after it raised.

    Attributes:
        expects: the names a step may carry and what each must be; None takes anything.
    """

    def __init__(self, epoch: int, settings: HandoffSettings, expects: Mapping[str, Expected] | None = None) -> None:
        self.expects = expects
        self._epoch, self._settings = epoch, settings
        self._session: bytes | None = None
        self._next_seq = 0
        self._step: int | None = None  # None between steps
        self._count = 0  # tensors of this step
        self._last_step = -1
        self._tensors: list[Tensor] = []
        self._buffers = _Buffers(settings.window_bytes // 2)
        self._building: _Building | None = None
        self._step_bytes = self._step_cost = 0
        self._received = self._consumed = self._reported = 0  # cost of whole steps since the link began

    @property
    def held(self) -> int:
        """Cost of the whole steps that the stage has not taken out."""
        return self._received - self._consumed

    @property
    def unreported(self) -> int:
        """Credit that the sender has not been told of."""
        return self._consumed - self._reported

    def begin(self, hello: pb.Hello) -> None:
        """A connection was opened. Raises EpochError or SessionError if it is not a connection of this link."""
        if hello.epoch != self._epoch:
            raise EpochError(f"stage {hello.rank} belongs to plan {hello.epoch}, this one to plan {self._epoch}")
        if hello.window_bytes != self._settings.window_bytes:
            raise SessionError(
                f"stage {hello.rank} has a window of {hello.window_bytes} bytes, "
                f"this one of {self._settings.window_bytes}"
            )
        if self._session not in (None, hello.session):
            raise SessionError(f"stage {hello.rank} was started anew, what it had sent before is lost")
        self._session = hello.session

    def accepted(self) -> pb.Accepted:
        """What the sender is to be told. It then knows of all credit."""
        self._reported = self._consumed
        return pb.Accepted(next_seq=self._next_seq, consumed=self._consumed)

    def consume(self, step: Step) -> None:
        """The stage has taken `step` out, and keeps nothing of its memory."""
        self._consumed += step.cost
        for tensor in step.tensors:
            self._buffers.give_back(tensor.data)

    def add(self, chunk: pb.Chunk, payload: memoryview) -> Step | None:
        """Takes one chunk; returns the step that it completes. Raises the HandoffError that ends the link."""
        if chunk.epoch != self._epoch:
            raise EpochError(f"a chunk of plan {chunk.epoch} arrived, this is plan {self._epoch}")
        if chunk.seq < self._next_seq:
            return None
        if chunk.seq > self._next_seq:
            raise GapError(f"chunk {chunk.seq} arrived where chunk {self._next_seq} was due")
        if self._step is None:
            self._open_step(chunk)
        if (chunk.step, chunk.tensor_index, chunk.tensor_count) != (self._step, len(self._tensors), self._count):
            due = f"tensor {len(self._tensors)} of {self._count} of step {self._step}"
            raise StepError(f"{_name(chunk)} arrived as one of {chunk.tensor_count} tensors where {due} was due")
        if self._building is None:
            self._building = self._open_tensor(chunk)
        self._building.add(chunk, payload)
        self._next_seq += 1
        self._step_cost += cost(len(payload))
        if not self._building.whole:
            return None
        self._tensors.append(self._building.tensor())
        self._building = None
        return self._close_step() if len(self._tensors) == self._count else None

    def _open_step(self, chunk: pb.Chunk) -> None:
        if chunk.step <= self._last_step:
            raise StepError(f"step {chunk.step} arrived after step {self._last_step}")
        if not 1 <= chunk.tensor_count <= MAX_TENSORS:
            raise MalformedFrameError(f"step {chunk.step} announces {chunk.tensor_count} tensors")
        if self._received - self._reported >= self._settings.window_bytes:
            raise CreditError(
                f"step {chunk.step} arrived while {self._received - self._reported} bytes were in flight, "
                f"but the window is {self._settings.window_bytes}"
            )
        self._step, self._count = chunk.step, chunk.tensor_count
        self._tensors, self._step_bytes, self._step_cost = [], 0, 0

    def _open_tensor(self, chunk: pb.Chunk) -> _Building:
        if any(chunk.tensor == tensor.name for tensor in self._tensors):
            raise TensorError(f"{_name(chunk)} came twice in its step")
        if self.expects is not None:
            if chunk.tensor not in self.expects:
                raise TensorError(f"{_name(chunk)} was not agreed on, only {', '.join(self.expects)}")
            self.expects[chunk.tensor].check(chunk)
        nbytes = tensor_bytes(chunk.dtype, chunk.shape)
        self._step_bytes += nbytes
        if self._step_bytes > self._settings.max_step_bytes:
            raise TensorError(
                f"{_name(chunk)}: the step announces {self._step_bytes} bytes, "
                f"more than {self._settings.max_step_bytes}"
            )
        if not 1 <= chunk.count <= max(nbytes, 1):
            raise TensorError(f"{_name(chunk)} announces {chunk.count} chunks for {nbytes} bytes")
        return _Building(chunk, self._buffers.take(nbytes))

    def _close_step(self) -> Step:
        assert self._step is not None
        step = Step(self._step, tuple(self._tensors), self._step_cost)
        self._received += step.cost
        self._last_step, self._step, self._tensors = self._step, None, []
        return step


def _name(chunk: pb.Chunk) -> str:
    shape = "x".join(map(str, chunk.shape))
    return f"step {chunk.step}, {chunk.tensor} ({dtype_name(chunk.dtype)} {shape}), chunk {chunk.index}"
