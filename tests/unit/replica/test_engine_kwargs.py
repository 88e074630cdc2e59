"""The engine gets the step that its place was planned for, whatever vLLM would choose on this machine."""

from pathlib import Path

import pytest

from pomarium.cluster.replica.hosting import ask_of
from pomarium.cluster.replica.llm_server import engine_kwargs
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.serve_plan import STEP_REQUESTS, STEP_TOKENS, ModelPlan


@pytest.mark.parametrize(
    ("given", "tokens", "requests"),
    [({}, STEP_TOKENS, STEP_REQUESTS), ({"max_num_batched_tokens": 512, "max_num_seqs": 8}, 512, 8)],
)
def test_plan_and_engine_agree(given: dict[str, int], tokens: int, requests: int) -> None:
    plan = ModelPlan("m", engine_args=given)
    kwargs = engine_kwargs(plan, {})
    assert (kwargs["max_num_batched_tokens"], kwargs["max_num_seqs"]) == (tokens, requests)
    ask = ask_of(plan, Found(Path("/nowhere"), None))
    assert (ask.rows, ask.sampled) == (tokens, requests)
