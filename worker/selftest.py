"""Does this machine compute the embedded model right? The worker's own path against mlx-lm's, on the machine's device.

    embedded checkpoint --load--> one module --reference (mlx-lm's forward, its cache)--+
                                             --ModelRunner (rows, paged pool, sampler)--+--> Report

Rows of `pomarium selftest`. Nothing but the worker is involved, unless the caller brings another way to generate, such
as vLLM's engine, here or over several Macs.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
from transformers import AutoTokenizer

from pomarium.worker import blas, parity
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.choose import attention_backend, decode_graphs
from pomarium.worker.device import Device, use
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.model_runner import ModelRunner, UnreadStep
from pomarium.worker.models.embedded import path as embedded_path
from pomarium.worker.models.load import load
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.selftest_rows import Row, Verdict, fact
from pomarium.worker.settings import DeviceKind
from pomarium.worker.settings import load as load_settings
from pomarium.worker.step import CachedRequest, NewRequest, Step, StepResult

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Il était une fois, dans un verger de pommiers,",
    "1, 1, 2, 3, 5, 8, 13,",
    "A",
)
NEW_TOKENS = 24
BLOCK_SIZE = 16

Generate = Callable[[PagedModel, Sequence[Sequence[int]], int], list[list[int]]]
"""(model, prompts, new tokens) -> greedy tokens of each prompt."""

MakeBackend = Callable[[PagedPool], AttentionBackend]


@dataclass(frozen=True)
class Report:
    """What was seen.

    Attributes:
        tokens: compared; equal: of them equal to mlx-lm's. near_ties: prompts that part where mlx-lm was undecided.
        failures: prompts that part elsewhere.
        seconds: of our path, for all prompts in one batch.
    """

    device: str
    dtype: str
    bound: float
    tokens: int
    equal: int
    near_ties: tuple[str, ...]
    failures: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if every prompt agrees, near ties aside."""
        return not self.failures

    def rows(self, name: str = "model") -> Iterator[Row]:
        """The counts, then each prompt that parts from mlx-lm's text."""
        text = (
            f"{self.equal} of {self.tokens} tokens equal to mlx-lm's, on the {self.device} in {self.dtype}, bound "
            f"{self.bound:.0e}, {self.seconds:.1f} s"
        )
        yield Row(name, Verdict.OK if self.passed else Verdict.WRONG, text)
        for tie in self.near_ties:
            yield fact("near tie", tie)
        for each in self.failures:
            yield Row("prompt", Verdict.WRONG, each)


def generate(
    make_backend: MakeBackend,
    model: PagedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    graphs: bool = False,
) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch through runner, paged pool and sampler.

    Args:
        graphs: decode steps are graphs that are sent before the last one's tokens are read, as in a worker on a GPU.

    Raises:
        UnsupportedError: none could be traced.
    """
    length = max(map(len, prompts)) + new_tokens
    per_request = -(-length // BLOCK_SIZE) * len({layer.window for layer in model.layers})
    layout = single_group_layout(model.layers, BLOCK_SIZE, 1 + per_request * len(prompts))
    backend = make_backend(PagedPool(layout, model.dtype))
    decode = decode_graphs(model, backend) if graphs else None
    forward = PagedForward(model, backend, decode, queues=graphs)
    runner = ModelRunner(forward, Sampler(model.vocab_size, engine_seed=0), lambda stats: None, ahead=graphs)
    unread: deque[StepResult | UnreadStep] = deque()
    blocks = np.arange(1, layout.num_blocks).reshape(len(prompts), len(layout.groups), -1)
    greedy = SamplingParams(temperature=0.0)
    new = tuple(
        NewRequest(str(index), tuple(prompt), len(prompt), 0, tuple(tuple(t) for t in blocks[index].tolist()), greedy)
        for index, prompt in enumerate(prompts)
    )
    step = Step({request.id: len(request.token_ids) for request in new}, new)
    tokens: list[list[int]] = [[] for _ in prompts]

    def read_all_but(newest: int) -> None:
        while len(unread) > newest:
            for row, sampled in zip(tokens, unread.popleft().read().token_ids, strict=True):
                row += sampled

    for number in range(new_tokens):
        runner.execute(step)
        unread.append(runner.sample())
        read_all_but(1 if graphs else 0)
        cached = tuple(CachedRequest(request.id, len(request.token_ids) + number, None) for request in new)
        step = Step({request.id: 1 for request in new}, cached=cached)
    read_all_but(0)
    if graphs and (decode is None or not decode.traced):
        raise UnsupportedError("no decode step could be traced: set POMARIUM_DECODE_GRAPHS=0")
    return tokens


def has_graphs() -> bool:
    """Whether a worker on this machine runs decode steps as graphs. Raises PomariumError as `run`."""
    settings = load_settings(os.environ)
    return settings.decode_graphs and use(settings).kind is DeviceKind.GPU


def run(compared: Generate | None = None, *, graphs: bool = False) -> Report:
    """Run it. Raises PomariumError if the device or the embedded model cannot be used.

    Args:
        compared: with mlx-lm; by default this process's worker, with the attention that it takes on the device.
        graphs: as `generate`, of this process's worker.
    """
    settings = load_settings(os.environ)
    blas.load()
    device: Device = use(settings)
    dtype = mx.float32 if device.kind is DeviceKind.CPU else mx.bfloat16
    directory = embedded_path()
    loaded = load(directory, dense=device.kind is DeviceKind.CPU, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    references = [parity.reference(loaded.model, prompt, NEW_TOKENS) for prompt in prompts]
    model = prepare(loaded.model, loaded.config["model_type"])
    backend = partial(attention_backend, device=device, mla_kernel=settings.mla_kernel)
    way = compared or partial(generate, backend, graphs=graphs)
    began = time.perf_counter()
    tokens = way(model, prompts, NEW_TOKENS)
    seconds = time.perf_counter() - began
    bound = parity.FLOAT32_BOUND if dtype == mx.float32 else parity.HALF_BOUND
    ties: list[str] = []
    failures: list[str] = []
    equal = 0
    for prompt, got, want in zip(PROMPTS, tokens, references, strict=True):
        mismatch = parity.first_mismatch(got, want)
        equal += NEW_TOKENS if mismatch is None else mismatch.index
        if mismatch is not None:
            (ties if mismatch.lead <= bound else failures).append(f"{prompt!r}: {mismatch}")
    return Report(
        device=f"{device.kind} ({device.name})",
        dtype=str(dtype).removeprefix("mlx.core."),
        bound=bound,
        tokens=NEW_TOKENS * len(prompts),
        equal=equal,
        near_ties=tuple(ties),
        failures=tuple(failures),
        seconds=seconds,
    )
