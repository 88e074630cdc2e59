"""Rows of logits to be sampled, from a prompt and an output apart."""

from collections.abc import Sequence

from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling_params import SamplingParams


def sampling_row(request_id: str, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> SamplingRow:
    return SamplingRow(request_id, params, (*prompt, *output), len(prompt))
