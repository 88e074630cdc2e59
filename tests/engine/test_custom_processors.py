"""Custom logits processors (vLLM's LLM(logits_processors=...)) see a persistent batch as in vLLM's own runner.

`ForbidLast` bars the token that its request generated last, for requests that ask through extra_args; it keeps state
by batch index, moved about by BatchUpdate, and checks on every call that this state covers the batch exactly.
`KeepBest`, argmax-invariant, leaves random requests nothing but their most likely token.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from engine_process import counter, engine, generate, tokens_of
from equality import reference
from tiny_models import build, write_checkpoint
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

pytestmark = pytest.mark.e2e

LENGTHS = (40, 3, 75, 12, 1, 28, 9, 60)


class ByIndex(LogitsProcessor):
    """A processor that holds, by batch index, the extra_args and the running output of each request."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[dict[str, Any], list[int]]] = {}

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            del self.rows[index]
        for index, params, _, output in batch_update.added:
            self.rows[index] = (params.extra_args or {}, output)
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                self.rows[source], self.rows[target] = self.rows[target], self.rows[source]
            else:
                self.rows[target] = self.rows.pop(source)
        assert sorted(self.rows) == list(range(batch_update.batch_size))


class ForbidLast(ByIndex):
    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(self.rows)
        for index, (extra, output) in self.rows.items():
            if extra.get("forbid_last") and output:
                logits[index, output[-1]] = -float("inf")
        return logits


class KeepBest(ByIndex):
    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(self.rows)
        for index, (extra, _) in self.rows.items():
            if extra.get("keep_best"):
                best = logits[index].argmax()
                value = logits[index, best].item()
                logits[index] = -float("inf")
                logits[index, best] = value
        return logits


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Scarce blocks and small chunks, so that requests leave the batch and come back at other indices."""
    model = write_checkpoint("qwen2", tmp_path_factory.mktemp("checkpoint") / "qwen2")
    with engine(
        model, logits_processors=[ForbidLast, KeepBest], max_num_batched_tokens=32, num_gpu_blocks_override=18
    ) as opened:
        yield opened


def prompts() -> list[list[int]]:
    random = np.random.default_rng(4)
    return [random.integers(3, 120, length).tolist() for length in LENGTHS]


def repeats(tokens: list[int]) -> int:
    return sum(one == other for one, other in pairwise(tokens))


def test_stateful_processor_in_a_ragged_batch(llm: LLM) -> None:
    """This model repeats itself (see the last assertion), unless told not to."""
    asked = [index % 3 != 2 for index in range(len(LENGTHS))]
    params = [
        SamplingParams(temperature=0, max_tokens=10 + 5 * index, ignore_eos=True, extra_args={"forbid_last": forbids})
        for index, forbids in enumerate(asked)
    ]
    alone = [tokens_of(generate(llm, [prompt], one)[0]) for prompt, one in zip(prompts(), params, strict=True)]
    before = counter(llm, "vllm:num_preemptions")
    together = [tokens_of(output) for output in generate(llm, prompts(), params)]
    assert counter(llm, "vllm:num_preemptions") > before
    assert together == alone
    assert all(repeats(tokens) == 0 for tokens, forbids in zip(together, asked, strict=True) if forbids)
    assert all(repeats(tokens) > 0 for tokens, forbids in zip(together, asked, strict=True) if not forbids)


def test_argmax_invariant_processor_acts_on_random_requests(llm: LLM) -> None:
    model = build("qwen2")
    kept = SamplingParams(temperature=2.0, seed=1, max_tokens=12, ignore_eos=True, extra_args={"keep_best": True})
    free = SamplingParams(temperature=2.0, seed=1, max_tokens=12, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    params = [(kept, free, greedy)[index % 3] for index in range(len(LENGTHS))]
    for index, output in enumerate(generate(llm, prompts(), params)):
        want = list(reference(model, prompts()[index], 12).tokens)
        assert (tokens_of(output) == want) is (index % 3 != 1)
