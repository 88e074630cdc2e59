"""Greedy tokens from vLLM's engine, for comparisons with mlx-lm's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM


def greedy(llm: "LLM", prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """`new_tokens` of each prompt, all in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
