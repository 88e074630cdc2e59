"""Forms that clients want answers in, through vLLM's own engine: one compiler per engine, and no form harms another."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from engine_process import engine, tokens_of
from tiny_models import write_checkpoint
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import StructuredOutputsParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = {"prompt_token_ids": [10, 20, 30]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = write_checkpoint("llama", tmp_path_factory.mktemp("model"))
    with engine(model) as running:
        yield running


def params(max_tokens: int = 200, **form: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, structured_outputs=StructuredOutputsParams(**form))


def answer(llm: LLM, **form: Any) -> str:
    (output,) = llm.generate([PROMPT], params(**form), use_tqdm=False)
    return output.outputs[0].text


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def test_the_compiler_is_the_engines_not_the_first_requests(llm: LLM) -> None:
    assert llm.llm_engine.vllm_config.structured_outputs_config.backend == "guidance"
    assert os.environ["VLLM_MAX_N_SEQUENCES"] == "128"
    assert answer(llm, choice=["yes", "no"]) in ("yes", "no")
    assert answer(llm, choice=["a\nb", 'q"x']) in ("a\nb", 'q"x')
    pair = {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "minItems": 2, "items": False}
    assert json.loads(answer(llm, json=pair)) == [1, 2]
    assert answer(llm, regex="[ab]{3}c").endswith("c")
    assert answer(llm, grammar='root ::= "th" "in"') == "thin"
    limited = {"type": "string", "maxLength": 5}
    assert len(json.loads(answer(llm, json=limited))) <= 5


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json": nested(250)}, "nest|recursion"),
        ({"json": json.dumps(nested(250))}, "nest|recursion"),
        ({"json": {"$ref": "#"}}, "no text"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": {"properties": {f"p{i}": {} for i in range(900)}}}, "items"),
        ({"grammar": "root ::= root"}, "no text"),
        ({"regex": ""}, "no text"),
        ({"choice": [""]}, "no text"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_others_go_on(llm: LLM, form: dict[str, Any], words: str) -> None:
    plain = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (alone,) = llm.generate([PROMPT], plain, use_tqdm=False)
    llm.enqueue([PROMPT], plain, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match=words):
        llm.generate([PROMPT], params(**form), use_tqdm=False)
    (beside,) = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    assert tokens_of(beside) == tokens_of(alone)


def test_many_answers_to_one_prompt_are_bounded(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="n must be at most 128"):
        SamplingParams(n=129)
