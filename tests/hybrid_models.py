"""Tiny hybrid models (attention and gated-delta layers) and the driver that gives them blocks and state slots.

HYBRIDS[name] --build_hybrid--> nn.Module      HybridDriver: step_driver.Driver with one table of state slots more
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from step_driver import Driver, Live, Recorder
from tiny_models import build, write_checkpoint

from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.hybrid import EagerStateBackend, HybridBackend, StateBackend
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import StateLayout, StatePool, single_group_states
from pomarium.worker.model_runner import ModelRunner
from pomarium.worker.models.paged import PagedModel, StageModel, prepare
from pomarium.worker.sampling.sampler import Sampler

Config = dict[str, Any]

_GATED_DELTA: Config = {
    "num_hidden_layers": 6,
    "full_attention_interval": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_EXPERTS: Config = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_ROPE: Config = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

HYBRIDS: dict[str, Config] = {
    "qwen3_next": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **_GATED_DELTA,
        **_EXPERTS,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
    },
    "qwen3_next_dense": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        **_GATED_DELTA,
        **_EXPERTS,
        "mlp_only_layers": list(range(6)),
        "partial_rotary_factor": 0.5,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForCausalLM"],
        **_GATED_DELTA,
        "rope_parameters": _ROPE,
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        **_GATED_DELTA,
        **_EXPERTS,
        "rope_parameters": _ROPE,
    },
}
"""Name -> what differs from tiny_models' llama: two attention layers among six, key heads of 32, value heads of 16."""

ONE_SLOT = 1 << 20
"""Tokens per state slot when a sequence keeps one for its whole life: vLLM's mode "none"."""


def build_hybrid(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The mlx-lm model of `HYBRIDS[name]` with random float32 weights, evaluated."""
    return build("llama", seed, **{**_copied(name), **overrides})


def write_hybrid(name: str, directory: Path, **overrides: Any) -> Path:
    """Write `build_hybrid(name)` as an mlx-lm directory, tokenizer included."""
    return write_checkpoint("llama", directory, **{**_copied(name), **overrides})


def _copied(name: str) -> Config:
    # mlx-lm's argument classes change the rope_parameters that they are given.
    return {key: dict(value) if isinstance(value, dict) else value for key, value in HYBRIDS[name].items()}


@cache
def paged_hybrid(name: str) -> PagedModel:
    """`build_hybrid(name)`, ready for the paged cache."""
    return prepare(build_hybrid(name), HYBRIDS[name]["model_type"])


def poisoned_states(layout: StateLayout) -> EagerStateBackend:
    """MLX operations over a pool of not-a-numbers, so that a state read before it was written shows."""
    pool = StatePool(layout)
    every = mx.arange(layout.num_slots)
    for layer in range(len(layout.layers)):
        pool.write(layer, every, *(mx.full(array.shape, np.nan, array.dtype) for array in pool.read(layer, every)))
    mx.eval(pool.arrays)
    return EagerStateBackend(pool)


def hybrid_backend(
    model: PagedModel | StageModel,
    num_blocks: int,
    block_size: int,
    states: StateBackend,
    attention: Callable[[PagedPool], AttentionBackend] = GatheredAttention,
) -> HybridBackend:
    """A backend of attention, over a pool of its own, and of `states`."""
    paged = PagedPool(single_group_layout(model.layers, block_size, num_blocks), model.dtype)
    return HybridBackend(attention(paged), states)


class HybridDriver(Driver):
    """A Driver for hybrid models: the table behind the attention layers' holds state slots.

    Args:
        tokens_per_slot: ONE_SLOT, or `block_size` for vLLM's mode "align": a new slot at each block.
        states: makes the backend of the states. attention: that of attention.
        late: see Driver. graphs: makes those of decode steps, if there are any.
    """

    def __init__(
        self,
        model: PagedModel,
        block_size: int = 16,
        num_blocks: int = 512,
        tokens_per_slot: int = ONE_SLOT,
        states: Callable[[StateLayout], StateBackend] = poisoned_states,
        attention: Callable[[PagedPool], AttentionBackend] = GatheredAttention,
        late: bool = False,
        graphs: Callable[[PagedModel, HybridBackend], DecodeGraphs | None] = lambda model, backend: None,
    ) -> None:
        super().__init__(model, block_size, num_blocks, late=late)
        layout = single_group_states(model.states, tokens_per_slot, num_blocks, len(self.layout.groups))
        backend = hybrid_backend(model, num_blocks, block_size, states(layout), attention)
        self.graphs = graphs(model, backend)
        self.recorder = Recorder(PagedForward(model, backend, self.graphs, queues=late))
        sampler = Sampler(model.vocab_size, engine_seed=0)
        self.runner = ModelRunner(self.recorder, sampler, lambda stats: None, ahead=late)

    def _grow(self, request: Live, length: int) -> tuple[tuple[int, ...], ...]:
        if not request.tables:
            request.tables = tuple([] for _ in range(len(self.layout.groups) + 1))
        return super()._grow(request, length)
