"""Every field of vLLM's SamplingParams is honoured, and every case here can fail.

    CASES[name] = parameters, the fields dropped in turn, a check of the answer against mlx-lm's own logits

Each case runs as it is, where its check passes, and once for each dropped field, where the same check fails: a field
of the worker's is dropped where the worker translates it (vllm_translation.sampling_of), any other from the request.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from engine_process import counter, engine, generate, log_softmax, tokens_of
from tiny_models import BOS, EOS, build, write_checkpoint
from vllm import LLM, SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from pomarium.worker import vllm_translation
from pomarium.worker.sampling_params import SamplingParams as WorkerParams

pytestmark = pytest.mark.e2e

A, B, C, OPEN, CLOSE = (ord(character) - 29 for character in "ABC[]")
"""Token ids: the tiny tokenizer has one for each printable character."""
PROMPT = tuple(np.random.default_rng(2).integers(40, 90, 20).tolist())
LOGPROB_BOUND = 1e-4

Check = Callable[[Sequence[RequestOutput]], None]


@dataclass(frozen=True)
class Case:
    """Parameters, what they must show, and which fields to drop, of the worker's and of the request's."""

    params: Mapping[str, Any]
    check: Check
    worker: tuple[str, ...] = ()
    request: tuple[str, ...] = ()
    prompt: tuple[int, ...] = PROMPT
    copies: int = 1


@cache
def model() -> nn.Module:
    return build("llama")


def logits_of(output: RequestOutput) -> np.ndarray:
    """mlx-lm's logits before each generated token, float32 (generated, vocab)."""
    prompt, tokens = list(output.prompt_token_ids or ()), tokens_of(output)
    logits = model()(mx.array([prompt + tokens[:-1]]))[0]
    return np.array(logits)[len(prompt) - 1 :]


def greedy_under(change: Callable[[np.ndarray, list[int]], np.ndarray]) -> Check:
    """Every token is the most likely after `change` of the raw logits, given the tokens before it."""

    def check(outputs: Sequence[RequestOutput]) -> None:
        (output,) = outputs
        tokens = tokens_of(output)
        for index, row in enumerate(logits_of(output)):
            assert tokens[index] == change(row.copy(), tokens[:index]).argmax()

    return check


def within(kept: Callable[[np.ndarray], np.ndarray], temperature: float) -> Check:
    """Every token is among those that `kept` marks in the distribution over the temperature."""

    def check(outputs: Sequence[RequestOutput]) -> None:
        (output,) = outputs
        probabilities = np.exp(log_softmax(logits_of(output) / temperature))
        for token, row in zip(tokens_of(output), probabilities, strict=True):
            assert kept(row)[token]

    return check


def nucleus(row: np.ndarray, mass: float) -> np.ndarray:
    order = np.argsort(-row)
    before = np.cumsum(row[order]) - row[order]
    kept = np.zeros(len(row), dtype=bool)
    kept[order[before < mass]] = True
    return kept


def presence(row: np.ndarray, earlier: list[int]) -> np.ndarray:
    row[list(set(earlier))] -= 2.0
    return row


def frequency(row: np.ndarray, earlier: list[int]) -> np.ndarray:
    np.subtract.at(row, earlier, 1.5)
    return row


def repetition(row: np.ndarray, earlier: list[int]) -> np.ndarray:
    seen = list({*earlier, *PROMPT})
    row[seen] = np.where(row[seen] > 0, row[seen] / 1.8, row[seen] * 1.8)
    return row


def each(test: Callable[[RequestOutput], bool]) -> Check:
    def check(outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            assert test(output), f"{tokens_of(output)} {output.outputs[0].text!r} {output.outputs[0].finish_reason}"

    return check


def text_of(output: RequestOutput) -> str:
    return str(output.outputs[0].text)


def ended(reason: str, stop: int | str | None = None) -> Callable[[RequestOutput], bool]:
    return lambda output: (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (reason, stop)


def same_as_the_first(outputs: Sequence[RequestOutput]) -> None:
    assert len({tuple(tokens_of(output)) for output in outputs}) == 1


def sampled_logprobs(outputs: Sequence[RequestOutput]) -> None:
    """The token's own and the three most likely, with mlx-lm's values and ranks."""
    (output,) = outputs
    assert output.outputs[0].logprobs
    for token, found, row in zip(
        tokens_of(output), output.outputs[0].logprobs, log_softmax(logits_of(output)), strict=True
    ):
        assert set(found) == {token, *np.argsort(-row)[:3].tolist()}
        for index, entry in found.items():
            assert abs(entry.logprob - row[index]) < LOGPROB_BOUND
            assert entry.rank == (row > row[index]).sum() + 1


def prompt_logprobs(outputs: Sequence[RequestOutput]) -> None:
    (output,) = outputs
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPT)
    assert output.prompt_logprobs[0] is None
    table = log_softmax(np.array(model()(mx.array([PROMPT]))[0]))[:-1]
    for token, found, row in zip(PROMPT[1:], output.prompt_logprobs[1:], table, strict=True):
        assert set(found) == {token, *np.argsort(-row)[:2].tolist()}
        assert all(abs(entry.logprob - row[index]) < LOGPROB_BOUND for index, entry in found.items())


def named_logprobs(outputs: Sequence[RequestOutput]) -> None:
    (output,) = outputs
    assert output.outputs[0].logprobs
    for token, found, row in zip(
        tokens_of(output), output.outputs[0].logprobs, log_softmax(logits_of(output)), strict=True
    ):
        assert set(found) == {token, A, B}
        assert all(abs(entry.logprob - row[index]) < LOGPROB_BOUND for index, entry in found.items())


def three_answers(outputs: Sequence[RequestOutput]) -> None:
    (output,) = outputs
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3


def is_object(output: RequestOutput) -> bool:
    try:
        return set(json.loads(text_of(output))) == {"a"}
    except (json.JSONDecodeError, TypeError):
        return False


GREEDY: dict[str, Any] = {"temperature": 0.0}
RANDOM: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 40, "ignore_eos": True}
ALWAYS_A: dict[str, Any] = {**GREEDY, "logit_bias": {A: 100.0}}
ALWAYS_EOS: dict[str, Any] = {**GREEDY, "logit_bias": {EOS: 100.0, A: 50.0}}
JSON_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}

CASES: dict[str, Case] = {
    "temperature": Case(
        {"temperature": 0.0, "seed": 1, "max_tokens": 30, "ignore_eos": True},
        greedy_under(lambda row, _: row),
        worker=("temperature",),
        request=("temperature",),
    ),
    "top_p": Case({**RANDOM, "top_p": 0.4}, within(lambda row: nucleus(row, 0.4), 1.5), ("top_p",), ("top_p",)),
    "top_k": Case({**RANDOM, "top_k": 2}, within(lambda row: row >= np.sort(row)[-2], 1.5), ("top_k",), ("top_k",)),
    "min_p": Case({**RANDOM, "min_p": 0.5}, within(lambda row: row >= 0.499 * row.max(), 1.5), ("min_p",), ("min_p",)),
    "seed": Case({"temperature": 1.5, "seed": 5}, same_as_the_first, ("seed",), ("seed",), copies=3),
    "presence_penalty": Case(
        {**GREEDY, "presence_penalty": 2.0, "max_tokens": 40, "ignore_eos": True},
        greedy_under(presence),
        ("presence_penalty",),
        ("presence_penalty",),
    ),
    "frequency_penalty": Case(
        {**GREEDY, "frequency_penalty": 1.5, "max_tokens": 40, "ignore_eos": True},
        greedy_under(frequency),
        ("frequency_penalty",),
        ("frequency_penalty",),
    ),
    "repetition_penalty": Case(
        {**GREEDY, "repetition_penalty": 1.8, "ignore_eos": True},
        greedy_under(repetition),
        ("repetition_penalty",),
        ("repetition_penalty",),
    ),
    "logit_bias": Case(
        {**GREEDY, "logit_bias": {A: 100.0}}, each(lambda o: set(tokens_of(o)) == {A}), ("logit_bias",), ("logit_bias",)
    ),
    "allowed_token_ids": Case(
        {**RANDOM, "allowed_token_ids": [A, B]},
        each(lambda o: set(tokens_of(o)) == {A, B}),
        ("allowed_token_ids",),
        ("allowed_token_ids",),
    ),
    "bad_words": Case(
        {**GREEDY, "bad_words": ["BB"], "logit_bias": {B: 100.0, C: 50.0}},
        each(lambda o: text_of(o) == "BC" * 8),
        ("bad_words",),
        ("bad_words",),
    ),
    "min_tokens": Case(
        {**ALWAYS_EOS, "min_tokens": 5},
        each(lambda o: tokens_of(o) == [A] * 5 + [EOS]),
        ("min_tokens",),
        ("min_tokens",),
    ),
    "stop_token_ids": Case(
        {**GREEDY, "logit_bias": {B: 100.0, A: 50.0}, "stop_token_ids": [B], "min_tokens": 3},
        each(lambda o: tokens_of(o) == [A, A, A, B] and ended("stop", B)(o)),
        ("stop_token_ids",),
        ("stop_token_ids",),
    ),
    "ignore_eos": Case(
        {**ALWAYS_EOS, "ignore_eos": True}, each(lambda o: tokens_of(o) == [EOS] * 16), request=("ignore_eos",)
    ),
    "max_tokens": Case({**ALWAYS_A, "max_tokens": 5}, each(lambda o: tokens_of(o) == [A] * 5), request=("max_tokens",)),
    "n": Case({"n": 3, "seed": 5, "temperature": 1.5}, three_answers, request=("n",)),
    "stop": Case(
        {**ALWAYS_A, "stop": ["AAA"]}, each(lambda o: text_of(o) == "" and ended("stop", "AAA")(o)), request=("stop",)
    ),
    "include_stop_str_in_output": Case(
        {**ALWAYS_A, "stop": ["AAA"], "include_stop_str_in_output": True},
        each(lambda o: text_of(o) == "AAA"),
        request=("include_stop_str_in_output",),
    ),
    "skip_special_tokens": Case(
        {**GREEDY, "logit_bias": {BOS: 100.0}, "skip_special_tokens": False},
        each(lambda o: "<s>" in text_of(o)),
        request=("skip_special_tokens",),
    ),
    "detokenize": Case({**ALWAYS_A, "detokenize": False}, each(lambda o: text_of(o) == ""), request=("detokenize",)),
    "logprobs": Case({**GREEDY, "logprobs": 3}, sampled_logprobs, ("num_logprobs",), ("logprobs",)),
    "prompt_logprobs": Case(
        {**GREEDY, "prompt_logprobs": 2}, prompt_logprobs, ("num_prompt_logprobs",), ("prompt_logprobs",)
    ),
    "logprob_token_ids": Case(
        {**GREEDY, "logprobs": 2, "logprob_token_ids": [A, B]},
        named_logprobs,
        ("logprob_token_ids",),
        ("logprob_token_ids",),
    ),
    "flat_logprobs": Case(
        {**GREEDY, "logprobs": 1, "flat_logprobs": True},
        each(lambda o: isinstance(o.outputs[0].logprobs, FlatLogprobs)),
        request=("flat_logprobs",),
    ),
    "structured json": Case(
        {
            **RANDOM,
            "ignore_eos": False,
            "structured_outputs": StructuredOutputsParams(json=JSON_SCHEMA, disable_any_whitespace=True),
        },
        each(is_object),
        request=("structured_outputs",),
    ),
    "structured regex": Case(
        {**RANDOM, "ignore_eos": False, "structured_outputs": StructuredOutputsParams(regex="[a-c]{4}=[0-9]{3}")},
        each(lambda o: text_of(o)[4] == "=" and len(text_of(o)) == 8 and text_of(o)[5:].isdigit()),
        request=("structured_outputs",),
    ),
    "structured choice": Case(
        {**RANDOM, "ignore_eos": False, "structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
        each(lambda o: text_of(o) in ("yes", "no")),
        request=("structured_outputs",),
    ),
    "structured grammar": Case(
        {
            **RANDOM,
            "ignore_eos": False,
            "structured_outputs": StructuredOutputsParams(grammar='root ::= "x" ("+" "x")? "!"'),
        },
        each(lambda o: text_of(o) in ("x!", "x+x!")),
        request=("structured_outputs",),
    ),
    "repetition_detection": Case(
        {**ALWAYS_A, "repetition_detection": RepetitionDetectionParams(max_pattern_size=1, min_count=4)},
        each(lambda o: ended("repetition", "repetition_detected")(o) and len(tokens_of(o)) < 16),
        request=("repetition_detection",),
    ),
    "thinking_token_budget": Case(
        {**ALWAYS_A, "thinking_token_budget": 4},
        each(lambda o: tokens_of(o)[:5] == [A, A, A, A, CLOSE] and CLOSE not in tokens_of(o)[5:]),
        request=("thinking_token_budget",),
        prompt=(*PROMPT, OPEN),
    ),
}


ELSEWHERE = {
    "output_kind": "test_output_kind_and_stream_interval",
    "stream_interval": "test_output_kind_and_stream_interval",
    "skip_reading_prefix_cache": "test_skip_reading_prefix_cache",
    "extra_args": "test_custom_processors.py, whose processors read it",
    "trace_decode_token_ids": "test_trace_replay_is_refused",
    "skip_clone": "vLLM's own: whether it may reuse the object",
    "routed_experts_prompt_start": "concerns --enable-return-routed-experts only, which returns no tokens",
    "spaces_between_special_tokens": "no effect with tokenizers whose decoder adds no spaces, the only ones we rebuild",
    "output_text_buffer_length": "computed by vLLM",
    "_eos_token_id": "computed by vLLM",
    "_all_stop_token_ids": "computed by vLLM",
    "_bad_words_token_ids": "computed by vLLM",
}
"""Fields of vLLM's SamplingParams without a case: the test that covers them, or why none does."""

WORKER_ELSEWHERE = {"extra_args"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    reasoning = ReasoningConfig(reasoning_start_str="[", reasoning_end_str="]")
    with engine(checkpoint, reasoning_config=reasoning) as opened:
        yield opened


def answers(llm: LLM, case: Case, drop: str | None = None) -> list[RequestOutput]:
    params = {key: value for key, value in case.params.items() if key != drop}
    return generate(llm, [case.prompt] * case.copies, [SamplingParams(**params) for _ in range(case.copies)])


@pytest.mark.parametrize("name", CASES)
def test_parameter_is_honoured(name: str, llm: LLM) -> None:
    CASES[name].check(answers(llm, CASES[name]))


def default_of(name: str) -> Any:
    """The value with which the worker's parameter changes nothing."""
    (found,) = [entry for entry in fields(WorkerParams) if entry.name == name]
    return found.default if found.default_factory is MISSING else found.default_factory()


@pytest.mark.parametrize(("name", "dropped"), [(name, drop) for name, case in CASES.items() for drop in case.worker])
def test_dropping_it_in_the_worker_turns_the_case_red(
    name: str, dropped: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    translate = vllm_translation.sampling_of
    monkeypatch.setattr(
        vllm_translation, "sampling_of", lambda params: replace(translate(params), **{dropped: default_of(dropped)})
    )
    outputs = answers(llm, CASES[name])
    with pytest.raises(AssertionError):
        CASES[name].check(outputs)


@pytest.mark.parametrize(("name", "dropped"), [(name, drop) for name, case in CASES.items() for drop in case.request])
def test_dropping_it_from_the_request_turns_the_case_red(name: str, dropped: str, llm: LLM) -> None:
    outputs = answers(llm, CASES[name], dropped)
    with pytest.raises(AssertionError):
        CASES[name].check(outputs)


def test_every_field_has_a_case_or_a_reason() -> None:
    dropped = {drop for case in CASES.values() for drop in case.request}
    assert dropped | ELSEWHERE.keys() == set(SamplingParams.__struct_fields__)
    assert not dropped & ELSEWHERE.keys()
    in_worker = {drop for case in CASES.values() for drop in case.worker}
    assert in_worker | WORKER_ELSEWHERE == {entry.name for entry in fields(WorkerParams)}


def streamed(llm: LLM, request_id: str, params: SamplingParams) -> list[int]:
    """Number of tokens in every output of one request, as a streaming client gets them."""
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(PROMPT)}, params)
    lengths: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        lengths += [len(tokens_of(output)) for output in llm.llm_engine.step()]
    return lengths


def test_output_kind_and_stream_interval(llm: LLM) -> None:
    def lengths(name: str, kind: RequestOutputKind, **more: Any) -> list[int]:
        return streamed(llm, name, SamplingParams(**GREEDY, max_tokens=9, ignore_eos=True, output_kind=kind, **more))

    assert lengths("delta", RequestOutputKind.DELTA) == [1] * 9
    assert lengths("cumulative", RequestOutputKind.CUMULATIVE) == list(range(1, 10))
    assert lengths("final", RequestOutputKind.FINAL_ONLY) == [9]
    assert lengths("interval", RequestOutputKind.DELTA, stream_interval=4) == [1, 4, 4]


def test_skip_reading_prefix_cache(llm: LLM) -> None:
    prompt = [*PROMPT, *PROMPT, 99]
    before = counter(llm, "vllm:prefix_cache_hits")
    cached = [
        generate(llm, [prompt], SamplingParams(temperature=0, skip_reading_prefix_cache=skip))[0].num_cached_tokens
        for skip in (None, None, True)
    ]
    assert cached[1] == 32
    assert cached[2] == 0
    assert counter(llm, "vllm:prefix_cache_hits") - before <= 16 + 32


def test_trace_replay_is_refused(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="enable-trace-replay"):
        generate(llm, [PROMPT], SamplingParams(trace_decode_token_ids=[5, 6]))


def test_thinking_budget_without_reasoning_is_refused(checkpoint: Path) -> None:
    with engine(checkpoint) as plain, pytest.raises(VLLMValidationError, match="reasoning"):
        generate(plain, [PROMPT], SamplingParams(thinking_token_budget=4))
