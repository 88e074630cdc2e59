"""vLLM's own engine in the process of the test: scheduler, block manager and detokenizer over our platform and worker.

    engine(directory, arguments, environment) --> vllm.LLM     generate(llm, prompts, parameters) --> answers, in order

With VLLM_ENABLE_V1_MULTIPROCESSING=0 no process is started, so a test can replace a function of the worker and read the
worker's own figures. An engine of a tiny model takes 0.2 s, the first one of a process 15 s (vLLM's imports).
"""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import vllm.envs
from equality import check_tokens
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from pomarium.worker.parity import Reference

KV_BYTES = 8 << 20
"""More than any tiny model here needs; vLLM's block table of the 2 GiB default alone takes seconds to build."""


@contextmanager
def engine(model: Path, environment: Mapping[str, str] | None = None, **arguments: Any) -> Iterator[LLM]:
    """An engine of `model`, shut down afterwards. Context 256, 8 MiB of KV cache, eight sequences unless overridden."""
    defaults = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": False,
    }
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "POMARIUM_STEP_SECONDS": "1000",  # what a busy machine takes for a step must not decide what is in it
        "POMARIUM_GAP_SECONDS": "0",
        **(environment or {}),
    }
    # vLLM freezes what there is, this engine with it: then only the whole heap could be looked through for its garbage.
    with patch.dict(os.environ, variables), patch("vllm.v1.engine.core.freeze_gc_heap"):
        llm = LLM(str(model), **{**defaults, **arguments})
        try:
            yield llm
        finally:
            _shut_down(llm)


def _shut_down(llm: LLM) -> None:
    """EngineCore.shutdown less torch.accelerator.empty_cache, which raises where torch has no accelerator."""
    core = llm.llm_engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    vllm.envs.disable_envs_cache()
    gc.collect()
    _freeze_what_stays()


@cache
def _freeze_what_stays() -> None:
    """What the first engine has imported stays: to look through it once more takes longer than to run a tiny engine."""
    gc.freeze()


def generate(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """Answers to token-id prompts, all submitted at once."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs: list[RequestOutput] = llm.generate(requests, params, use_tqdm=False)
    return outputs


def tokens_of(output: RequestOutput) -> list[int]:
    """Generated tokens of a request's first completion."""
    return list(output.outputs[0].token_ids)


def check_answers(llm: LLM, wanted: Sequence[Reference], greedy: SamplingParams) -> list[int]:
    """Assert mlx-lm's tokens of all prompts at once; return how many tokens of each came from a cached prefix."""
    answers = generate(llm, [want.prompt for want in wanted], greedy)
    for answer, want in zip(answers, wanted, strict=True):
        check_tokens(tokens_of(answer), want)
    return [answer.num_cached_tokens or 0 for answer in answers]


def counter(llm: LLM, name: str) -> int:
    """Value of one of vLLM's counters, such as "vllm:num_preemptions"."""
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == name))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def logprob_table(positions: Sequence[Mapping[int, Any]], vocab_size: int) -> np.ndarray:
    """vLLM's log-probabilities of a whole vocabulary (logprobs=-1), float64 (positions, vocab)."""
    table = np.full((len(positions), vocab_size), np.nan)
    for row, found in zip(table, positions, strict=True):
        for token, entry in found.items():
            row[token] = entry.logprob
    return table
