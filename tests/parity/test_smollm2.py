"""The embedded model against mlx-lm's own forward: SmolLM2-135M-Instruct in float32, twenty-two prompts.

prompt --mlx-lm--> continuation and logits
       --our runner, teacher-forced, in chunks and in company--> logits at every position
       --vllm.LLM, free-running--> greedy tokens
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from engine_process import engine, tokens_of
from equality import BOUND, check_tokens, logit_error, reference
from step_driver import Driver
from tokenizers import Tokenizer
from vllm import SamplingParams

from pomarium.worker import blas
from pomarium.worker.models import embedded
from pomarium.worker.models.load import LoadedModel, load
from pomarium.worker.models.paged import prepare
from pomarium.worker.parity import Reference

pytestmark = pytest.mark.e2e

NEW_TOKENS = 12
LONG = " ".join(
    f"Day {day}: the keeper lit lamp {day * 7 % 31}, wrote {day * day} in the log and slept till dawn."
    for day in range(1, 22)
)
PROMPTS = {
    "english": "The capital of France is",
    "instruction": "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
    "python": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "c": "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; i++)\n\t\t",
    "sql": "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY",
    "json": '{"name": "apple", "tags": ["fruit", "red"], "price": 1.25, "stock":',
    "html": '<ul class="menu">\n  <li><a href="/">Home</a></li>\n  <li>',
    "german": "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen",
    "french": "Il était une fois, dans un pays lointain, une petite fille qui",
    "spanish": "En un lugar de la Mancha, de cuyo nombre no quiero acordarme,",
    "russian": "Все счастливые семьи похожи друг на друга,",
    "chinese": "人工智能是计算机科学的一个分支，它的目标是",
    "japanese": "吾輩は猫である。名前はまだ無い。",
    "korean": "대한민국의 수도는",
    "arabic": "كان يا ما كان في قديم الزمان",
    "hindi": "भारत की राजधानी",
    "emoji": "🍎🍊🍋 I love fruit 😀👩‍👩‍👧‍👦! Give me more: 🍇",
    "digits": "3.14159265358979323846264338327950288419716939937510",
    "whitespace": "   \n\n\t\t  \n    ",
    "repeated": "ha " * 60,
    "one token": "The",
    "long": LONG,
}


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    """On the CPU whatever the machine has: the bound is float32's. With a BLAS, as the worker: else minutes."""
    blas.load()
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield load(embedded.path(), dense=True, dtype=mx.float32)
    mx.set_default_device(device)


@pytest.fixture(scope="module")
def references(model: LoadedModel) -> dict[str, Reference]:
    tokenizer = Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))
    return {
        name: reference(model.model, tokenizer.encode(text, add_special_tokens=False).ids, NEW_TOKENS)
        for name, text in PROMPTS.items()
    }


def test_prompts_are_of_the_lengths_they_stand_for(references: dict[str, Reference]) -> None:
    assert len(references) >= 20
    assert len(references["one token"].prompt) == 1
    assert 500 < len(references["long"].prompt) < 700


def test_logits_at_every_position(model: LoadedModel, references: dict[str, Reference]) -> None:
    paged = prepare(model.model, model.config["model_type"])
    forced = {name: [*want.prompt, *want.tokens[:-1]] for name, want in references.items()}
    names = list(forced)
    errors = {}
    for group in (names[:11], names[11:]):
        driver = Driver(paged, block_size=16, num_blocks=256)
        last = driver.run({name: forced[name] for name in group}, 1, chunks=(24, 7, 64))
        for name in group:
            rows = driver.recorder.logits[name]
            got = np.stack([rows[position] for position in range(len(forced[name]))])
            errors[name] = logit_error(got, references[name].logits)
            assert len(last[name]) == 1
    print("largest logit errors:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < BOUND


def test_greedy_tokens_of_the_engine(references: dict[str, Reference]) -> None:
    """From text, through vLLM's tokenizer and scheduler, all at once, prompts in chunks of at most 128 tokens."""
    arguments = {"max_model_len": 1024, "max_num_seqs": 11, "kv_cache_memory_bytes": 256 << 20}
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with engine(embedded.path(), {"VLLM_MLX_DEVICE": "cpu"}, max_num_batched_tokens=128, **arguments) as llm:
        outputs = llm.generate(list(PROMPTS.values()), greedy, use_tqdm=False)
    near_ties = 0
    for output, want in zip(outputs, references.values(), strict=True):
        assert tuple(output.prompt_token_ids or ()) == want.prompt
        near_ties += check_tokens(tokens_of(output), want)
    print(f"SmolLM2-135M: {near_ties} near ties in {len(PROMPTS)} continuations of {NEW_TOKENS} tokens")
    assert near_ties <= 2
