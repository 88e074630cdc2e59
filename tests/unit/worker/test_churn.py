"""Requests come, are computed in chunks, decode, end and are aborted: what MLX holds stays the same to the byte.

Buffers that come and go while others stay are what kernels of macOS panicked of (mlx issue 3186), and a worker that
held one more with each request would fill a Mac in a day. After every step the arrays there are have to be weights,
pool and constants alone: as many, and of as many bytes, as before.
"""

import gc
import random
from collections import Counter
from itertools import count

import mlx.core as mx
import pytest
from hybrid_models import HybridDriver, paged_hybrid
from step_driver import Driver, Live
from tiny_models import TINY, build

from pomarium.worker.models.paged import prepare
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import CachedRequest, NewRequest, Step

MOST_LIVE, LONGEST_PROMPT, MOST_NEW, MOST_CHUNK = 6, 40, 12, 24
SETTLED = 200
"""Steps until what is made once, such as the arrays of a sampling path that is first taken, has been made."""
PARAMETERS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(temperature=1.0, top_k=20, repetition_penalty=1.1, num_logprobs=2),
)


class Churn:
    """A scheduler that nobody plans for: every step some requests come, some are aborted, all others go on."""

    def __init__(self, driver: Driver, seed: int = 0) -> None:
        self.driver, self.random = driver, random.Random(seed)
        self.live: list[Live] = []
        self.finished: frozenset[str] = frozenset()
        self.happened: Counter[str] = Counter()
        self._names = map(str, count())

    def step(self) -> None:
        """One step of the engine."""
        if len(self.live) < MOST_LIVE and self.random.random() < 0.4:
            self._arrive()
        scheduled: dict[str, int] = {}
        new: list[NewRequest] = []
        cached: list[CachedRequest] = []
        for request in self.live:
            tokens = min(self.random.randint(1, MOST_CHUNK), len(request.tokens) - request.computed)
            fresh = self.driver._grow(request, request.computed + tokens)
            scheduled[request.id] = tokens
            if request.started:
                cached.append(CachedRequest(request.id, request.computed, fresh, False, None))
            else:
                new.append(NewRequest(request.id, tuple(request.tokens), request.prompt, 0, fresh, request.sampling))
            request.started = True
            self.happened["prompt" if request.computed < request.prompt else "decode"] += 1
        finished, self.finished = self.finished, frozenset()
        if self.driver.runner.execute(Step(scheduled, tuple(new), tuple(cached), finished)):
            result = self.driver.runner.sample().read()
            sampled = dict(zip(result.request_ids, result.token_ids, strict=True))
            for request in self.live:
                request.computed += scheduled[request.id]
                request.tokens += sampled[request.id]
        self.driver.recorder.logits.clear()
        for request in list(self.live):
            if len(request.tokens) - request.prompt >= request.wanted:
                self._leave(request, "end")
            elif self.random.random() < 0.03:
                self._leave(request, "abort")

    def _arrive(self) -> None:
        prompt = [self.random.randrange(3, 120) for _ in range(self.random.randint(1, LONGEST_PROMPT))]
        wanted, sampling = self.random.randint(1, MOST_NEW), self.random.choice(PARAMETERS)
        self.live.append(Live(next(self._names), prompt, len(prompt), wanted, sampling))
        self.happened["arrival"] += 1

    def _leave(self, request: Live, how: str) -> None:
        self.driver._take_blocks(request)
        self.live.remove(request)
        self.finished |= {request.id}
        self.happened[how] += 1


def arrays() -> int:
    """MLX arrays that Python holds."""
    gc.collect()
    return sum(type(each) is mx.array for each in gc.get_objects())


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("llama", 2_000),
        ("qwen3_next", 400),
        pytest.param("llama", 10_000, marks=pytest.mark.full),
        pytest.param("qwen3_next", 10_000, marks=pytest.mark.full),
    ],
)
def test_nothing_is_left_behind(name: str, steps: int) -> None:
    if name == "llama":
        driver = Driver(prepare(build(name, num_hidden_layers=2), TINY[name]["model_type"]), 8, 64)
    else:
        driver = HybridDriver(paged_hybrid(name), 8)
    churn = Churn(driver)
    for _ in range(SETTLED):
        churn.step()
    held, bytes_held = arrays(), mx.get_active_memory()
    assert held > 0
    assert bytes_held > 0
    seen: Counter[int] = Counter()
    for number in range(SETTLED, steps):
        churn.step()
        seen[mx.get_active_memory()] += 1
        if number % 1000 == 0:
            assert arrays() == held
    assert set(seen) == {bytes_held}
    assert arrays() == held
    assert min(churn.happened[what] for what in ("arrival", "prompt", "decode", "end", "abort")) >= steps // 20


def test_one_array_that_stays_is_seen() -> None:
    held, bytes_held = arrays(), mx.get_active_memory()
    left = mx.zeros((100,))
    mx.eval(left)
    assert arrays() == held + 1
    assert mx.get_active_memory() > bytes_held
