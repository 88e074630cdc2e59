"""Six requests of unlike length and unlike parameters (greedy, seeded, penalised, structured, with log-probabilities),
and what each answers alone in a plain engine: whatever changes around them, the answers must not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engine_process import engine, generate, tokens_of
from equality import BOUND
from tiny_models import write_checkpoint
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import StructuredOutputsParams

LENGTHS = (33, 7, 100, 1, 70, 16)
NEW_TOKENS = 24
BLOCK_SIZE = 16
PLAIN = {"enable_prefix_caching": False, "block_size": BLOCK_SIZE, "max_num_batched_tokens": 2048}
LOGPROB_BOUND = 20 * BOUND
"""Absolute: the bound of the logits, whose largest is 16 (llama) and 20 (gemma3_text) here."""

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    {"temperature": 1.0, "seed": 8, "prompt_logprobs": 2, "logprobs": 0},
    {"temperature": 1.1, "top_k": 12, "min_p": 0.01, "seed": 9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 20, "seed": 10},
    {"temperature": 0.9, "seed": 11, "structured_outputs": StructuredOutputsParams(regex="([a-f]{3}-){40}")},
)


def parameters() -> list[SamplingParams]:
    """Fresh ones: vLLM keeps state in structured parameters."""
    return [SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **kind) for kind in KINDS]


def prompts(seed: int = 5) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 120, length).tolist() for length in LENGTHS]


@dataclass(frozen=True)
class Baseline:
    """A model and what each request answers by itself."""

    model: Path
    outputs: list[RequestOutput]


def baseline_of(name: str, folder: Path) -> Baseline:
    """The tiny model `name`, written into `folder`, and its answers."""
    model = write_checkpoint(name, folder / name)
    with engine(model, **PLAIN) as llm:
        outputs = [generate(llm, [prompt], one)[0] for prompt, one in zip(prompts(), parameters(), strict=True)]
    assert len({tuple(tokens_of(output)) for output in outputs}) == len(outputs), "the requests should differ"
    return Baseline(model, outputs)


def assert_same(got: Sequence[RequestOutput], want: Sequence[RequestOutput]) -> None:
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert tokens_of(ours) == tokens_of(theirs), f"request {index}"
        assert_close(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
        assert_close(ours.prompt_logprobs, theirs.prompt_logprobs)


def assert_close(got: Sequence[dict[int, Any] | None] | None, want: Sequence[dict[int, Any] | None] | None) -> None:
    """Log-probabilities, position by position."""
    for ours, theirs in zip(got or (), want or (), strict=True):
        assert (ours or {}).keys() == (theirs or {}).keys()
        for token, entry in (theirs or {}).items():
            assert abs((ours or {})[token].logprob - entry.logprob) < LOGPROB_BOUND


def scarce(model: Path) -> dict[str, int]:
    """Blocks for one sequence of 124 tokens, no more. Gemma's two groups of sliding layers take some, too."""
    blocks = 10 if model.name == "llama" else 17
    return {"num_gpu_blocks_override": blocks, "max_model_len": 124, "max_num_batched_tokens": 16}
