"""Decode steps in the loop that serves them: our runner beside mlx-lm, on this machine's GPU.

    ours     scheduler's steps, one planned before the last one's tokens are read --ModelRunner--> tokens read late
    mlx-lm   as mlx_lm.generate's generate_step: the next step is built and sent with the last token still lazy, then
             that token is read; a batch is padded to the longest
    --in_turns--> milliseconds per step

Part of kernels_gpu.py (step, serve, hybrid, latent, sampling), which says what it needs. Contexts are filled with
random K and V, and of a hybrid model with whatever states are there. Our loop has everything of a step that the worker
does, sampling and bookkeeping too; mlx-lm's has what its generator does.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.launch import Launcher
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.choose import decode_graphs
from pomarium.worker.attention.kernels import KernelAttention
from pomarium.worker.attention.mla import LatentKernelAttention
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import single_group_states
from pomarium.worker.model_runner import ModelRunner, UnreadStep
from pomarium.worker.models.gated_delta_kernels import with_states
from pomarium.worker.models.paged import PagedModel
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import BlockTables, CachedRequest, NewRequest, Step, StepResult

BLOCK_SIZE = 16
WARM_STEPS, STEPS, TURNS = 8, 20, 5
CHUNK = 128
"""Tokens of a prompt at once, for mlx-lm."""
ONE_SLOT = 1 << 20
"""Tokens per slot of a state: one for a request's whole life."""
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Way:
    """How our steps run. graphs: built once. ahead: sent before the last one's tokens are read."""

    graphs: bool
    ahead: bool


@dataclass
class Loop:
    """A runner and the scheduler that feeds it.

    Attributes:
        most_tokens: that a sequence has room for. sequences: at once. sampling: of each request.
        lengths: cached tokens of each request.
    """

    model: PagedModel
    launcher: Launcher
    way: Way
    most_tokens: int
    sequences: int
    sampling: SamplingParams = GREEDY
    lengths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._width = -(-self.most_tokens // BLOCK_SIZE)
        count = 1 + self._width * self.sequences
        pool = PagedPool(single_group_layout(self.model.layers, BLOCK_SIZE, count), self.model.dtype)
        fill(pool, count * BLOCK_SIZE)
        kind = LatentKernelAttention if any(layer.latent for layer in self.model.layers) else KernelAttention
        backend: AttentionBackend = kind(pool, self.launcher, this_gpu())
        if self.model.states:
            states = single_group_states(self.model.states, ONE_SLOT, 1 + self.sequences, table=1)
            backend = with_states(backend, states, self.launcher)
        self.graphs = decode_graphs(self.model, backend) if self.way.graphs else None
        forward = PagedForward(self.model, backend, self.graphs, queues=self.way.ahead)
        sampler = Sampler(self.model.vocab_size, engine_seed=0)
        self.runner = ModelRunner(forward, sampler, lambda stats: None, ahead=self.way.ahead)
        blocks = 1 + np.random.default_rng(0).permutation(count - 1)
        tables = [tuple(table) for table in blocks.reshape(self.sequences, self._width).tolist()]
        slots = [((1 + number,),) if self.model.states else () for number in range(self.sequences)]
        self._free: list[BlockTables] = [(table, *slot) for table, slot in zip(tables, slots, strict=True)]
        self._tables: dict[str, BlockTables] = {}
        self._unread: deque[StepResult | UnreadStep] = deque()
        self._finished: frozenset[str] = frozenset()
        self._new: tuple[NewRequest, ...] = ()

    def join(self, name: str, tokens: int, computed: int) -> None:
        """A request of `tokens` tokens, of which the first `computed` are in the cache."""
        self._tables[name] = self._free.pop()
        new = NewRequest(name, (1,) * tokens, tokens, computed, self._tables[name], self.sampling)
        self._new = (*self._new, new)
        self.lengths[name] = computed

    def leave(self, name: str) -> None:
        """The scheduler has found that a request has ended; its step on the way is for nobody."""
        self._free.append(self._tables.pop(name))
        del self.lengths[name]
        self._finished |= {name}

    def step(self) -> None:
        """Plan and send one step, and read the one before, or this one."""
        new = {request.id: len(request.token_ids) - request.num_computed_tokens for request in self._new}
        scheduled = {name: new.get(name, 1) for name in self.lengths}
        cached = tuple(CachedRequest(name, length, None) for name, length in self.lengths.items() if name not in new)
        step = Step(scheduled, self._new, cached, self._finished)
        self._new, self._finished = (), frozenset()
        self.runner.execute(step)
        self._unread.append(self.runner.sample())
        for name, count in scheduled.items():
            self.lengths[name] += count
        while len(self._unread) > (1 if self.way.ahead else 0):
            self._unread.popleft().read()


def steady(
    model: PagedModel, launcher: Launcher, way: Way, contexts: Sequence[int], sampling: SamplingParams = GREEDY
) -> Callable[[], None]:
    """A step of sequences that have so many tokens."""
    loop = Loop(model, launcher, way, max(contexts) + WARM_STEPS + TURNS * STEPS + 1, len(contexts), sampling)
    for number, context in enumerate(contexts):
        loop.join(str(number), context, context - 1)
    return loop.step


def coming_and_going(model: PagedModel, launcher: Launcher, way: Way, sequences: int, steps: int) -> tuple[float, int]:
    """Milliseconds per step, all counted, of `sequences` requests of which one ends and another comes each 8 steps; and
    the graphs that were traced."""
    random = np.random.default_rng(1)
    loop = Loop(model, launcher, way, 2048, sequences)
    for number in range(sequences):
        loop.join(str(number), int(random.integers(200, 1200)), 0)
        loop.step()
    traced = 0 if loop.graphs is None else loop.graphs.traced
    began = time.perf_counter()
    for number in range(steps):
        if number % 8 == 7:
            loop.leave(min(loop.lengths, key=int))
            loop.join(str(sequences + number), int(random.integers(16, 64)), 0)
        loop.step()
    mx.synchronize()
    taken = (time.perf_counter() - began) * 1e3 / steps
    return taken, 0 if loop.graphs is None else loop.graphs.traced - traced


def their_caches(module: Any, contexts: Sequence[int], kv_heads: int) -> list[Any]:
    """mlx-lm's, batched, filled with random K and V."""
    from mlx_lm.models.cache import BatchKVCache, KVCache

    longest, count = max(contexts), len(contexts)
    caches: list[Any] = []
    for _ in module.layers:
        cache = BatchKVCache([longest - context for context in contexts]) if count > 1 else KVCache()
        keys = mx.random.normal((count, kv_heads, longest - 1, 128)).astype(mx.bfloat16)
        cache.update_and_fetch(keys, keys)
        mx.eval(cache.keys, cache.values)
        caches.append(cache)
    mx.clear_cache()
    return caches


def their_filled_caches(module: Any, count: int, context: int) -> list[Any]:
    """Those of a hybrid model, of sequences of one length: filled by prompts, in chunks."""
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(module)
    for first in range(0, context - 1, CHUNK):
        mx.eval(module(mx.ones((count, min(CHUNK, context - 1 - first)), mx.int32), cache=caches))
    mx.clear_cache()
    return caches


def their_steps(module: Any, caches: list[Any], count: int) -> Iterator[None]:
    """mlx-lm's generator over its caches, a step at a time."""

    def step(tokens: mx.array) -> mx.array:
        logits = module(tokens[:, None], cache=caches)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.argmax(logprobs, axis=-1)

    tokens = step(mx.ones((count,), mx.int32))
    mx.async_eval(tokens)
    while True:
        following = step(tokens)
        mx.async_eval(following)
        tokens.tolist()
        tokens = following
        yield


def theirs(module: Any, caches: list[Any], count: int, *, ahead: bool) -> Callable[[], None]:
    """A step of the same by mlx-lm, sent ahead or waited for."""
    steps = their_steps(module, caches, count)

    def step() -> None:
        next(steps)
        if not ahead:
            mx.synchronize()

    return step


def in_turns(steps: Sequence[Callable[[], None]]) -> list[float]:
    """Milliseconds of each of these steps: the median of TURNS, each of STEPS steps of one after those of another, for
    the host's speed changes from one second to the next."""
    taken: list[list[float]] = [[] for _ in steps]
    for step in steps:
        for _ in range(WARM_STEPS):
            step()
    for _ in range(TURNS):
        for step, kept in zip(steps, taken, strict=True):
            mx.synchronize()
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            mx.synchronize()
            kept.append((time.perf_counter() - began) * 1e3 / STEPS)
    return [statistics.median(kept) for kept in taken]


def fill(pool: PagedPool, tokens: int) -> None:
    """Random keys and values in every block: zeros may be faster."""
    for layer, cache in enumerate(pool.layout.layers):
        rows = mx.arange(tokens * cache.num_kv_heads).reshape(tokens, cache.num_kv_heads)
        keys = mx.random.normal((tokens, cache.num_kv_heads, cache.head_dim)).astype(pool.dtype)
        pool.write(layer, rows, keys, None if cache.latent else keys)
        mx.eval(pool.arrays)
    mx.clear_cache()
