"""Images through vLLM's engine: placeholders, encoder cache and the ragged batch, against two references.

Logits after prompts with no, one and two images are those of transformers' and of mlx-vlm's own forward over the same
tiles, whatever a chunk cuts, whoever shares the batch, and after a preemption.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_process import KV_BYTES, counter, engine, log_softmax, logprob_table, tokens_of
from equality import BOUND, logit_error
from picture_files import picture
from PIL import Image
from vision_models import (
    TILE,
    VOCAB,
    expanded,
    mlx_vlm_logits,
    released,
    released_tiles,
    torch_logits,
    write_seeing,
)
from vision_models import (
    tokens_of as vocabulary_of,
)
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from pomarium.cluster.engine.images import sight
from pomarium.worker.errors import UnsupportedError

pytestmark = pytest.mark.e2e

MODE = "VLLM_METAL_MULTIMODAL_MODE"
NATIVE = {MODE: "multimodal-native"}
NEW_TOKENS = 4
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1)

WIDE, TALL, LONG, SMALL = picture(40, 30, 1), picture(9, 31, 2), picture(90, 20, 3), picture(7, 7, 4)
"""Of 2 x 2, 2 x 1 and 1 x 2 tiles; a small one is enlarged to 2 x 2."""


@dataclass(frozen=True)
class Asked:
    """A prompt as text, and its images."""

    text: str
    images: tuple[Image.Image, ...] = ()

    def request(self) -> dict[str, object]:
        """For vLLM."""
        seen = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt": self.text, **seen}


ASKED = {
    "none": Asked("<s>what is the time now, and where"),
    "one": Asked("<s>look at<image>what is it", (WIDE,)),
    "two": Asked("<s>this<image>or<image>?", (TALL, LONG)),
    "first": Asked("<image>at the start", (LONG,)),
    "last": Asked("<s>at the end<image>", (SMALL,)),
    "the same twice": Asked("<s><image><image>", (TALL, TALL)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeing")


def seeing(directory: Path, environment: dict[str, str], **limits: Any) -> AbstractContextManager[LLM]:
    """An engine that tells the log-probabilities of the whole vocabulary."""
    return engine(directory, environment, max_logprobs=-1, **limits)


def tiles_of(images: Sequence[Image.Image]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """transformers' tiles uint8 of `images`, and how many rows and columns of them each has."""
    found = [released_tiles(image) for image in images]
    tiles = [each[0] for each, _, _ in found]
    grids = [(rows[0][0], columns[0][0]) for _, rows, columns in found]
    return np.concatenate(tiles) if tiles else np.zeros((0, 3, TILE, TILE), np.uint8), grids


def check(directory: Path, asked: Asked, answer: RequestOutput) -> None:
    """Prompt and log-probabilities of `answer` are the references'."""
    tiles, grids = tiles_of(asked.images)
    vocabulary, text = vocabulary_of(directory), list(answer.prompt_token_ids or [])
    for rows, columns in grids:
        stands = expanded(rows, columns, vocabulary)
        places = [i for i in range(len(text)) if text[i : i + len(stands)] == stands]
        assert places, (asked.text, text, stands)
    tokens = tokens_of(answer)
    sequence = [*text, *tokens[:-1]]
    got = logprob_table(answer.outputs[0].logprobs, VOCAB)
    for reference in (torch_logits, mlx_vlm_logits):
        want = log_softmax(reference(directory, sequence, tiles)[-NEW_TOKENS:])
        assert logit_error(got, want) < BOUND


def answers(llm: LLM, asked: Sequence[Asked], params: SamplingParams = GREEDY) -> list[RequestOutput]:
    found: list[RequestOutput] = llm.generate([each.request() for each in asked], params, use_tqdm=False)
    return found


@pytest.mark.parametrize(
    ("family", "chunk"), [("idefics3", 2048), ("idefics3", 16), ("smolvlm", 9)], ids=lambda value: str(value)
)
def test_logits_are_the_references(family: str, chunk: int, folder: Path) -> None:
    """All at once: chunks of 9 and 16 tokens begin and end within images, at their ends and between them."""
    directory = released(family, folder)
    limits = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    with seeing(directory, NATIVE, **limits) as llm:
        for asked, answer in zip(ASKED.values(), answers(llm, list(ASKED.values())), strict=True):
            check(directory, asked, answer)


def test_an_image_is_found_in_the_prefix_cache(folder: Path) -> None:
    """And another one of the same size is not, although its tokens are the same."""
    directory = released("idefics3", folder)
    with seeing(directory, NATIVE, block_size=8) as llm:
        first, again, other = (
            answers(llm, [Asked(f"<s>see<image>{tail}", (image,))])[0]
            for tail, image in (("what", WIDE), ("then", WIDE), ("what", picture(40, 30, 9)))
        )
        for answer, tail, image in ((first, "what", WIDE), (again, "then", WIDE), (other, "what", picture(40, 30, 9))):
            check(directory, Asked(f"<s>see<image>{tail}", (image,)), answer)
        assert (first.num_cached_tokens or 0) == 0
        assert (again.num_cached_tokens or 0) >= 32
        assert (other.num_cached_tokens or 0) == 0


def test_a_preempted_request_sees_its_images_again(folder: Path) -> None:
    directory = released("idefics3", folder)
    asked = [ASKED["one"], ASKED["two"], ASKED["last"]]
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with seeing(directory, NATIVE, enable_prefix_caching=False) as llm:
        want = [tokens_of(answers(llm, [each], long)[0]) for each in asked]
    few = {"num_gpu_blocks_override": 14, "max_model_len": 120, "max_num_batched_tokens": 24}
    with seeing(directory, NATIVE, enable_prefix_caching=False, **few) as llm:
        got = [tokens_of(answer) for answer in answers(llm, asked, long)]
        assert counter(llm, "vllm:num_preemptions") > 0
    assert got == want


def test_embeddings_are_forgotten_as_the_scheduler_says(folder: Path) -> None:
    """Many images pass through a cache that holds few."""
    directory = released("idefics3", folder)
    asked = [Asked("<s><image>", (picture(40, 30, 100 + seed),)) for seed in range(12)]
    with seeing(directory, NATIVE, max_num_batched_tokens=32, kv_cache_memory_bytes=KV_BYTES) as llm:
        for each, answer in zip(asked, answers(llm, asked), strict=True):
            check(directory, each, answer)
        cache = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._pictures
        assert 0 < len(cache) <= 2


CHAT = [{"role": "user", "content": [{"type": "text", "text": "what"}]}]


@pytest.mark.parametrize("mode", ["auto", "multimodal-native", "text-only-compat"])
def test_modes(mode: str, folder: Path) -> None:
    """As text, the same answers to prompts without images, and one error for those with."""
    directory = released("smolvlm", folder)
    with seeing(directory, {MODE: mode}) as llm:
        check(directory, ASKED["none"], answers(llm, [ASKED["none"]])[0])
        assert len(llm.chat(CHAT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == NEW_TOKENS
        if mode == "text-only-compat":
            with pytest.raises(ValueError, match="text-only models"):
                answers(llm, [ASKED["one"]])
        else:
            check(directory, ASKED["one"], answers(llm, [ASKED["one"]])[0])


def test_without_a_tower_auto_serves_text_and_native_refuses(tmp_path: Path) -> None:
    directory = write_seeing("idefics3", tmp_path / "blind")
    (directory / "preprocessor_config.json").unlink()
    reason = "holds no preprocessor_config.json"
    with pytest.raises(UnsupportedError, match=rf"{MODE}=multimodal-native .*{reason}.*set {MODE}=auto"):
        start(directory, NATIVE)
    with seeing(directory, {MODE: "auto"}) as llm:
        check(directory, ASKED["none"], answers(llm, [ASKED["none"]])[0])
        with pytest.raises(ValueError, match="text-only models"):
            answers(llm, [ASKED["one"]])


def test_without_the_library_native_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "has_library", lambda: False)
    with pytest.raises(UnsupportedError, match="mlx-vlm, which has the vision towers, is not installed"):
        start(released("idefics3", folder), NATIVE)


def start(directory: Path, environment: dict[str, str]) -> None:
    """Start an engine, and end it."""
    with engine(directory, environment):
        pass


def test_a_larger_limit_is_the_operators(folder: Path) -> None:
    directory = released("idefics3", folder)
    nine = Asked("<s>" + "<image>" * 9, (SMALL,) * 9)
    with (
        seeing(directory, NATIVE, max_model_len=400) as llm,
        pytest.raises(VLLMValidationError, match="at most 8 images"),
    ):
        answers(llm, [nine])
    with seeing(directory, NATIVE, max_model_len=400, limit_mm_per_prompt={"image": 9}) as llm:
        check(directory, nine, answers(llm, [nine])[0])
