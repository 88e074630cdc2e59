"""The worker's runner, kernels and paged pool on this machine's GPU, against mlx-lm's own forward; random weights.

    config --mlx-lm--> module, bfloat16 --parity.reference--> tokens and logits of each prompt by itself --+
                          `--prepare--> ModelRunner: prompts whole and cut, in one batch --> the same --compare--> table

    python benchmarks/model_parity.py

Needs mlx, mlx-lm and numpy, no vLLM and no checkpoint. Greedy tokens may part where mlx-lm's two best logits are closer
than the bound (worker/parity.py); logits are compared up to there. Exits with 1 if a model is beyond the bound, or if
its kernels were not launched.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.launch import CudaLauncher, KernelSource, Launch, Launcher, MetalLauncher
from pomarium.worker import parity
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.choose import decode_graphs
from pomarium.worker.attention.kernels import KernelAttention
from pomarium.worker.attention.mla import LatentKernelAttention
from pomarium.worker.batch import Batch
from pomarium.worker.forward import Forward, PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import single_group_states
from pomarium.worker.model_runner import ModelRunner
from pomarium.worker.models.gated_delta_kernels import with_states
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import CachedRequest, NewRequest, Step

BLOCK_SIZE, NEW_TOKENS, VOCABULARY = 16, 12, 2048
LENGTHS = (1, 5, 16, 43, 200, 333)
"""Of the prompts."""
CUT_FROM = 43
"""Prompts of so many tokens or more come in two steps, the second behind what the first one cached."""
TOKENS_PER_SLOT = 1 << 20
"""A sequence keeps one slot of states for its whole life."""

_COMMON: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "intermediate_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON},
    "llama, two of four layers with a window of 64": {
        "model_type": "llama",
        **_COMMON,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
    },
    "gemma2, soft-cap": {
        "model_type": "gemma2",
        **_COMMON,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256.0,
    },
    "deepseek_v3, latents": {
        "model_type": "deepseek_v3",
        **_COMMON,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "first_k_dense_replace": 4,
        "n_routed_experts": 4,
    },
    "qwen3_next, gated delta": {
        "model_type": "qwen3_next",
        **_COMMON,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        # Without experts: which of them bfloat16 chooses hangs on the last bit.
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0, 1, 2, 3],
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 4096,
    },
}


@dataclass
class Counting:
    """A launcher that counts launches by kernel."""

    inner: Launcher
    launches: Counter[str] = field(default_factory=Counter)

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        self.launches[source.name] += 1
        return self.inner.launch(source, launch)


@dataclass
class Recording:
    """A Forward that keeps the logits of each row that is sampled, by request."""

    inner: Forward
    logits: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        """See Forward."""
        logits = self.inner.run(batch, token_ids)
        rows = np.array(logits.astype(mx.float32))
        for request, row in zip(batch.samplers, batch.sample_index, strict=True):
            self.logits.setdefault(request, []).append(rows[row])
        return logits

    def release(self, request_ids: Any) -> None:
        """See Forward."""
        self.inner.release(request_ids)


@dataclass(frozen=True)
class Outcome:
    """Of one model: tokens equal to mlx-lm's, of how many; largest difference of logits; places where they part."""

    equal: int
    tokens: int
    error: float
    wrong: int


def build(config: Mapping[str, Any]) -> Any:
    """The mlx-lm model of `config`, its initialisation as bfloat16."""
    classes = import_module(f"mlx_lm.models.{config['model_type']}")
    module = classes.Model(classes.ModelArgs.from_dict(dict(config)))
    module.update(tree_map(lambda weight: weight.astype(mx.bfloat16), module.parameters()))
    mx.eval(module.parameters())
    return module


def backend_of(model: PagedModel, num_blocks: int, slots: int, launcher: Launcher) -> AttentionBackend:
    """Kernels for all that `model` keeps."""
    layout = single_group_layout(model.layers, BLOCK_SIZE, num_blocks)
    pool = PagedPool(layout, model.dtype)
    latent = any(layer.latent for layer in model.layers)
    attention: AttentionBackend = (LatentKernelAttention if latent else KernelAttention)(pool, launcher, this_gpu())
    if not model.states:
        return attention
    states = single_group_states(model.states, TOKENS_PER_SLOT, slots, len(layout.groups))
    return with_states(attention, states, launcher)


def requests(model: PagedModel, prompts: Sequence[Sequence[int]]) -> tuple[list[NewRequest], int]:
    """A request for each prompt, with all the blocks it will need, and the number of blocks there are."""
    groups = len({layer.window for layer in model.layers})
    width = -(-(max(map(len, prompts)) + NEW_TOKENS) // BLOCK_SIZE)
    blocks = 1 + np.random.default_rng(0).permutation(groups * width * len(prompts))
    greedy = SamplingParams(temperature=0.0)
    made = []
    for number, (prompt, tables) in enumerate(zip(prompts, blocks.reshape(len(prompts), groups, width), strict=True)):
        slots = ((number + 1,),) if model.states else ()
        owned = (*(tuple(table) for table in tables.tolist()), *slots)
        made.append(NewRequest(str(number), tuple(prompt), len(prompt), 0, owned, greedy))
    return made, blocks.size + 1


def generate(
    model: PagedModel, prompts: Sequence[Sequence[int]], launcher: Launcher
) -> tuple[list[list[int]], list[list[np.ndarray]]]:
    """Greedy tokens of all prompts, and the logits that each was drawn from, through runner, kernels and sampler."""
    new, num_blocks = requests(model, prompts)
    backend = backend_of(model, num_blocks, len(prompts) + 1, launcher)
    graphs = decode_graphs(model, backend)
    forward = Recording(PagedForward(model, backend, graphs, queues=graphs is not None))
    sampler = Sampler(model.vocab_size, engine_seed=0)
    runner = ModelRunner(forward, sampler, lambda stats: None, ahead=graphs is not None)
    lengths = {request.id: len(request.token_ids) for request in new}
    tokens: dict[str, list[int]] = {request.id: [] for request in new}
    computed = dict.fromkeys(lengths, 0)
    step = Step({id: length // 2 if length >= CUT_FROM else length for id, length in lengths.items()}, tuple(new))
    while step.num_scheduled_tokens:
        runner.execute(step)
        result = runner.sample().read()
        for id, sampled in zip(result.request_ids, result.token_ids, strict=True):
            tokens[id] += sampled
            computed[id] += step.num_scheduled_tokens[id]
        running = [id for id in lengths if len(tokens[id]) < NEW_TOKENS]
        scheduled = {id: max(1, lengths[id] - computed[id]) for id in running}
        step = Step(scheduled, cached=tuple(CachedRequest(id, computed[id], None) for id in running))
    return list(tokens.values()), [forward.logits[id] for id in tokens]


def compare(
    references: Sequence[parity.Reference], tokens: Sequence[Sequence[int]], logits: Sequence[Sequence[np.ndarray]]
) -> Outcome:
    """Tokens and logits against mlx-lm's, each prompt up to where its tokens part."""
    equal, error, wrong = 0, 0.0, 0
    for want, got, rows in zip(references, tokens, logits, strict=True):
        mismatch = parity.first_mismatch(got, want)
        shared = len(got) if mismatch is None else mismatch.index
        equal += shared
        wrong += int(mismatch is not None and mismatch.lead > parity.HALF_BOUND)
        for index in range(min(shared + 1, len(got))):
            row = want.logits[len(want.prompt) - 1 + index]
            error = float(np.maximum(error, parity.logit_error(rows[index], row)))
    return Outcome(equal, sum(map(len, tokens)), error, wrong)


def main() -> int:
    """Print a Markdown table."""
    launcher: Launcher = MetalLauncher() if mx.metal.is_available() else CudaLauncher()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]
    print(f"prompts of {', '.join(map(str, LENGTHS))} tokens, {NEW_TOKENS} new ones each, bf16\n")
    print("| model | tokens as mlx-lm's | largest difference of logits | bound | | kernels launched |")
    print("|---|---:|---:|---:|---|---|")
    right = True
    for name, config in MODELS.items():
        mx.random.seed(0)
        module = build(config)
        references = [parity.reference(module, prompt, NEW_TOKENS) for prompt in prompts]
        counting = Counting(launcher)
        seen = compare(references, *generate(prepare(module, config["model_type"]), prompts, counting))
        good = seen.error <= parity.HALF_BOUND and not seen.wrong and bool(counting.launches)
        right = right and good
        launched = ", ".join(f"{kernel} {count}" for kernel, count in sorted(counting.launches.items()))
        cells = f"{seen.equal} of {seen.tokens} | {seen.error:.1e} | {parity.HALF_BOUND:.0e}"
        print(f"| {name} | {cells} | {'ok' if good else 'WRONG'} | {launched} |", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
