"""A stage of a pipeline whose model sleeps: all else of it is real.

    RelayRunner or ModelRunner over SleepingModel: fixed_ms + token_ms x T of sleep for a step of T tokens
    DelayedLinks: what is handed on leaves link_ms later, and the stage does not wait for that

The tensors are tiny, the sampled token is always 0. Asked for with `--worker-cls sleeping_stage.SleepingStage`.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from intervals import SLEEP, Interval
from stage_recorder import RecordingWorker
from vllm.v1.kv_cache_interface import KVCacheConfig

from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.tensors import Expected
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.paging import Paging
from pomarium.worker.kv_cache.placement import names_of
from pomarium.worker.models.stages import StageCut
from pomarium.worker.pipeline.links import StageLinks
from pomarium.worker.pipeline.stage import Stage
from pomarium.worker.sampling.sampler import Sampler

WIDTH = 8
"""Of hidden states, and size of the vocabulary."""
KV_BYTES = 64 << 20


@dataclass
class Pace:
    """Milliseconds; may be changed while nothing runs."""

    fixed_ms: float = 0.0
    token_ms: float = 0.0
    link_ms: float = 0.0


class DelayedOutbox:
    """Hands on after the link's delay, in order, on a thread of its own. Without a delay, at once."""

    def __init__(self, outbox: Outbox, pace: Pace) -> None:
        self._outbox, self._pace = outbox, pace
        self._due: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="delay", daemon=True)
        self._thread.start()

    def send(self, step: int, arrays: Mapping[str, mx.array], timeout_s: float) -> None:
        """As Outbox.send. What fails later is told by the link itself, as any failure of a link."""
        if not self._pace.link_ms:
            self._outbox.send(step, arrays, timeout_s)
            return
        due = time.monotonic() + self._pace.link_ms / 1000
        self._due.put((due, lambda: self._outbox.send(step, arrays, timeout_s)))

    def close(self) -> None:
        """After all that was sent."""
        self._due.put(None)
        self._thread.join(5)
        self._outbox.close()

    def _run(self) -> None:
        while (item := self._due.get()) is not None:
            due, send = item
            time.sleep(max(0.0, due - time.monotonic()))
            send()


class DelayedLinks(StageLinks):
    """Links with a delay."""

    def __init__(self, pace: Pace, *args: Any) -> None:
        """Further arguments as StageLinks."""
        super().__init__(*args)
        self._pace = pace

    def _outbox(self, address: str) -> Any:
        return DelayedOutbox(super()._outbox(address), self._pace)


class SleepingModel:
    """Stands for worker.models.paged.StageModel."""

    hidden_size = vocab_size = WIDTH
    dtype = mx.float32

    def __init__(self, cut: StageCut, pace: Pace, worker: RecordingWorker) -> None:
        self.cut = cut
        self.received = None if cut.has_embedding else mx.float32
        self._pace, self._worker = pace, worker

    def __call__(self, inputs: np.ndarray | mx.array, positions: np.ndarray, step: None, rows: np.ndarray) -> mx.array:
        """Zeros, after a while."""
        began = time.monotonic()
        time.sleep((self._pace.fixed_ms + self._pace.token_ms * len(positions)) / 1000)
        self._worker.intervals.append(Interval(self._worker.step, SLEEP, began, time.monotonic()))
        return mx.zeros((len(rows) if self.cut.has_head else len(positions), WIDTH))


class NoAttention:
    """Stands for a pool and what reads it."""

    arrays: tuple[()] = ()

    def prepare(self, batch: object) -> None:
        """Nothing is read."""


class DelayedStage(Stage):
    """A stage over DelayedLinks."""

    def __init__(self, pace: Pace, *args: Any) -> None:
        """Further arguments as Stage."""
        super().__init__(*args)
        self._pace = pace

    def listen(self, on_failure: Callable[[Exception], None]) -> str:
        """As Stage."""
        received = None if self.model.received is None else Expected(self.model.received, (None, WIDTH))
        self._links = DelayedLinks(self._pace, self.place, received, on_failure)
        return self._links.address


class SleepingStage(RecordingWorker):
    """See the module."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Nothing is loaded."""
        self.pace = Pace()
        place = self._surroundings.place
        assert place is not None
        self._stage = DelayedStage(self.pace, place, SleepingModel(place.cut, self.pace, self))
        entries = range(place.cut.first, place.cut.end)
        self.layers, self.kv_dtype, self.layer_names = (
            (LayerCache(1, WIDTH),) * len(entries),
            mx.float32,
            names_of(entries),
        )
        self.states, self.state_names = (), ()
        self._paging = Paging(self.cache_config.block_size)

    def set_pace(self, fixed_ms: float, token_ms: float, link_ms: float) -> None:
        """From the next step on."""
        self.pace.fixed_ms, self.pace.token_ms, self.pace.link_ms = fixed_ms, token_ms, link_ms

    def determine_available_memory(self) -> int:
        """Of a cache that nothing is written to."""
        return KV_BYTES

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Put the runner together, without a pool."""
        assert self._stage is not None
        self._blocks = (1,) * len(kv_cache_config.kv_cache_groups)
        sampler = Sampler(WIDTH, 0)
        self.runner = self._stage.runner(NoAttention(), sampler, self._publish, None, None)
