"""Checkpoints as transformers 5 saves them, through the worker's loader, against transformers' own forward in float32.

A reference beside mlx-lm's: what mlx-lm reads out of config.json wrongly, `verify` and `selftest` cannot see.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from config_keys import BY_THEIR_TEXT, shared_families
from mlx_lm.models.cache import make_prompt_cache
from transformers_models import CASES, DOC, UNTESTED, document, save

from pomarium.worker.errors import PomariumError
from pomarium.worker.models.load import load
from pomarium.worker.models.paged import prepare
from pomarium.worker.models.verify import verify

BOUND = 2e-5
"""Of the largest logit. Seen: 1e-6 or less in most families, 4e-6 in the recurrent ones."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if case.always else pytest.mark.full) for name, case in CASES.items()]
)
def test_logits_are_transformers_or_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokens, want = save(case, tmp_path)
    if case.refused is not None:
        with pytest.raises(PomariumError, match=case.refused):
            load(tmp_path, dense=True, dtype=mx.float32)
        return
    model = load(tmp_path, dense=True, dtype=mx.float32, longest=case.longest).model
    got = np.array(model(mx.array(tokens), cache=make_prompt_cache(model))[0].astype(mx.float32))
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{name}: {error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize(
    "name", ["mistral_window", "gemma2", "phi3_window", "qwen2_window", "gpt_oss_yarn", "qwen3_moe+linear", "glm"]
)
def test_what_is_put_right_holds_row_by_row_too(name: str, tmp_path: Path) -> None:
    """Windows, scaled rotations and parts of heads, over the paged pool: 24 tokens in two chunks, windows of 16."""
    save(CASES[name], tmp_path)
    model = load(tmp_path, dense=True, dtype=mx.float32).model
    verify(prepare(model, CASES[name].model_type), CASES[name].model_type)


def test_longrope_goes_by_the_longest_context_that_is_served(tmp_path: Path) -> None:
    """As in vLLM: short factors where no text can be longer than the original context, long ones for any else."""
    case = CASES["phi3_longrope"]
    tokens, want = save(case, tmp_path, length=case.config["original_max_position_embeddings"])
    errors = []
    for longest in (tokens.shape[1], None):
        model = load(tmp_path, dense=True, dtype=mx.float32, longest=longest).model
        got = np.array(model(mx.array(tokens), cache=make_prompt_cache(model))[0])
        errors.append(np.abs(got - want).max() / np.abs(want).max())
    assert errors[0] <= BOUND < errors[1]


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_is_refused_where_it_would_pick(name: str, tmp_path: Path) -> None:
    """mlx-lm's indexer picks other tokens than transformers': up to `index_topk` tokens both take all of them."""
    case = CASES[name]
    assert case.longest is not None
    save(case, tmp_path)
    load(tmp_path, dense=True, dtype=mx.float32, longest=case.longest)
    for longest in (case.longest + 1, None):
        with pytest.raises(PomariumError, match=f"set --max-model-len {case.longest} or less"):
            load(tmp_path, dense=True, dtype=mx.float32, longest=longest)


def test_every_shared_family_has_a_case_or_a_reason() -> None:
    covered = {case.model_type.replace("qwen3_5_text", "qwen3_5").replace("moe_text", "moe") for case in CASES.values()}
    families = set(shared_families()) | BY_THEIR_TEXT
    assert families == covered & families | set(UNTESTED)
    assert not covered & set(UNTESTED)


def test_the_table_in_the_docs_is_that_of_the_cases() -> None:
    """Otherwise: python tests/transformers_models.py"""
    text = DOC.read_text()
    assert document(text) == text
