"""vLLM's front end with a model folder's whole word on it: ends of answers, the chat template, tokens without a row."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_process import engine, generate, tokens_of
from tiny_models import VOCAB_SIZE, write_checkpoint
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from pomarium.worker.errors import CheckpointError

pytestmark = pytest.mark.e2e

CPU = {"VLLM_MLX_DEVICE": "cpu"}
PROMPT = [5, 17, 40, 33]
VARIED: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.8, "max_tokens": 24}
GREEDY = SamplingParams(**VARIED)
MESSAGES: Any = [{"role": "user", "content": "to be or not"}]
SURPLUS = 4


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def special(folder: Path, *tokens: tuple[int, str]) -> None:
    """Make `tokens` special ones in the folder's tokenizer."""
    file = folder / "tokenizer.json"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": token, "content": piece, **flags} for token, piece in tokens]
    edit(file, added_tokens=[*json.loads(file.read_text())["added_tokens"], *added])


def said(llm: LLM, params: SamplingParams) -> RequestOutput:
    return generate(llm, [PROMPT], params)[0]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The tokens of the model's greedy answer where nothing ends it."""
    with engine(write_checkpoint("llama", tmp_path_factory.mktemp("plain")), CPU) as llm:
        found = tokens_of(said(llm, SamplingParams(**VARIED, ignore_eos=True)))
    assert len(found) == GREEDY.max_tokens
    return found


@pytest.fixture(scope="module")
def end(answer: list[int]) -> tuple[int, int]:
    """(a token of the answer, where it comes first), not at the start."""
    place = next(i for i in range(6, len(answer)) if answer[i] not in answer[:i])
    return answer[place], place


def ending_in(folder: Path, end: int) -> Path:
    """A model one of whose end tokens is told by config.json alone, beside a generation_config.json without any."""
    write_checkpoint("llama", folder, eos_token_id=[2, end])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    special(folder, (end, next(piece for piece, token in vocabulary.items() if token == end)))
    edit(folder / "generation_config.json", do_sample=True, temperature=0.6)
    return folder


@contextmanager
def logged() -> Iterator[list[str]]:
    """The front end's log lines, however vLLM's loggers are set up."""
    lines: list[str] = []
    logger, handler = logging.getLogger("vllm.pomarium.front_end"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_ends_that_config_json_alone_names(tmp_path: Path, answer: list[int], end: tuple[int, int]) -> None:
    token, place = end
    with logged() as lines, engine(ending_in(tmp_path / "m", token), CPU) as llm:
        short = said(llm, GREEDY)
        ignoring = said(llm, SamplingParams(**VARIED, ignore_eos=True))
        least = said(llm, SamplingParams(**VARIED, min_tokens=place + 3))
        own = said(llm, SamplingParams(**VARIED, stop_token_ids=[answer[3]]))
    assert tokens_of(short) == answer[: place + 1]
    assert (short.outputs[0].finish_reason, short.outputs[0].stop_reason) == ("stop", token)
    assert tokens_of(ignoring) == answer
    assert tokens_of(least)[:place] == answer[:place]
    assert len(tokens_of(least)) >= place + 3
    assert token not in tokens_of(least)[: place + 3]
    assert tokens_of(own) == answer[:4]
    (line,) = lines
    assert f"({token}: config.json)" in line
    assert "</s> (2: tokenizer, config.json)" in line


def test_ends_of_another_generation_config(tmp_path: Path, answer: list[int], end: tuple[int, int]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    edit(other / "generation_config.json", eos_token_id=end[0])
    with engine(write_checkpoint("llama", tmp_path / "m"), CPU, generation_config=str(other)) as llm:
        assert tokens_of(said(llm, GREEDY)) == answer[: end[1] + 1]


def test_an_end_that_is_no_id_is_one_sentence(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    edit(folder / "generation_config.json", eos_token_id=[2.5])
    with pytest.raises(CheckpointError, match=r"generation_config\.json: its eos_token_id"), engine(folder, CPU):
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_the_template_of_chat_template_json(tmp_path: Path, workers: int) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    edit(folder / "chat_template.json", chat_template=config.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with engine(folder, CPU, renderer_num_workers=workers) as llm:
        (found,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False)
        assert llm.get_tokenizer().decode(found.prompt_token_ids) == "[user] to be or not</s>[assistant] "


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A tokenizer with four tokens more than the embedding has."""
    folder = write_checkpoint("llama", tmp_path_factory.mktemp("crowded"))
    special(folder, *((VOCAB_SIZE + i, f"<extra_{i}>") for i in range(SURPLUS)))
    with logged() as lines, engine(folder, CPU) as llm:
        assert any(f"has 4 tokens more than the model's {VOCAB_SIZE} (<extra_0>, <extra_1>" in line for line in lines)
        yield llm


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt_token_ids": [5, VOCAB_SIZE]},
        {"prompt_token_ids": [VOCAB_SIZE + SURPLUS]},
        {"prompt_token_ids": [5, -1]},
        "to be <extra_2> or not",
    ],
)
def test_a_prompt_with_a_token_that_has_no_row(crowded: LLM, prompt: Any) -> None:
    with pytest.raises(VLLMValidationError, match=r"token id|Token id"):
        crowded.generate([prompt], GREEDY, use_tqdm=False)
    assert len(crowded.generate(["to be or not"], GREEDY, use_tqdm=False)) == 1


def test_a_chat_with_a_token_that_has_no_row(crowded: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="token id 129"):
        crowded.chat([{"role": "user", "content": "<extra_1>"}], GREEDY, use_tqdm=False)


def test_a_prompt_that_was_rendered_elsewhere(crowded: LLM) -> None:
    rendered: Any = {"type": "token", "prompt_token_ids": [5, VOCAB_SIZE]}
    with pytest.raises(VLLMValidationError, match="token id 128"):
        crowded.llm_engine.add_request("r", rendered, GREEDY)
    assert not crowded.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "field",
    [
        {"stop_token_ids": [VOCAB_SIZE]},
        {"allowed_token_ids": [5, VOCAB_SIZE]},
        {"logprob_token_ids": [VOCAB_SIZE]},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
    ],
)
def test_every_other_index_of_a_request(crowded: LLM, field: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match="out-of-vocab"):
        generate(crowded, [PROMPT], SamplingParams(temperature=0, max_tokens=4, **field))


def test_bad_words_without_a_row_bar_nothing(crowded: LLM, answer: list[int]) -> None:
    params = SamplingParams(**VARIED, bad_words=["<extra_1>"])
    assert tokens_of(said(crowded, params)) == answer
