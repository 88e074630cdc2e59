"""What a decode step is expected to take of an Apple GPU: launches to send and bytes to read, by model and chip.

    configuration of a release --layers of 2 and 3, lazily--> launches of a layer and of the rest
                               --arithmetic-----------------> bytes of weights and of K and V that one token reads
    --chips.py--> least milliseconds, if memory were read at its published speed and a launch took nothing

    python benchmarks/step_expected.py

Nothing is computed and no weight is made: the graph of a step is built by MLX and its operations are counted, those
left out that only change a shape. MLX joins element-wise operations when it compiles the graph, so that the count is an
upper bound. For the first owner of a Mac to compare with: nothing here was measured on one.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from report import table

from pomarium.cluster.machine.chips import CHIPS
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import KernelSource, Launch
from pomarium.worker.attention.kernels import BatchPlans, KernelAttention, KernelStep
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models.paged import prepare

CONTEXT = 4096
WANTED = (("M4", 10), ("M4 Pro", 20), ("M4 Max", 40), ("M3 Ultra", 80))
VIEWS = frozenset(
    ["Broadcast", "Flatten", "Unflatten", "Reshape", "Transpose", "Squeeze", "ExpandDims", "Split", "Slice", "Full",
     "Depends"]
)  # fmt: skip
"""Operations of MLX that launch nothing, or next to nothing."""


@dataclass(frozen=True)
class Release:
    """A model as it is published. bits: of a weight with its scales. read: parameters that one token reads.

    Attributes:
        config: of mlx-lm's ModelArgs, narrow, for its operations. layers, kv_heads, head_dim: of the release.
    """

    name: str
    config: dict[str, Any]
    bits: float
    read: float
    layers: int
    kv_heads: int
    head_dim: int

    def bytes_read(self, context: int) -> tuple[float, float]:
        """(weights, K and V in 16 bits) of a token behind so many others."""
        return self.read * self.bits / 8, 2 * 2 * self.layers * self.kv_heads * self.head_dim * context


_NARROW: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "rms_norm_eps": 1e-5, "vocab_size": 128, "rope_theta": 1e4, "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
RELEASES = (
    Release("Qwen3 0.6B, bf16", {"model_type": "qwen3", **_NARROW}, 16, 0.6e9, 28, 8, 128),
    Release("Llama 3.1 8B, bf16", {"model_type": "llama", **_NARROW}, 16, 7.5e9, 32, 8, 128),
    Release("Llama 3.1 8B, 4 bits", {"model_type": "llama", **_NARROW}, 4.5, 7.5e9, 32, 8, 128),
    Release("Qwen3 30B-A3B, 4 bits", {"model_type": "qwen3_moe", **_NARROW, **_EXPERTS}, 4.5, 3.0e9, 48, 4, 128),
    Release("Llama 3.3 70B, 4 bits", {"model_type": "llama", **_NARROW}, 4.5, 69.5e9, 80, 8, 128),
)


class Counting:
    """A launcher that runs nothing. launches: so far, by kernel, MLX's own norms and rotations among them."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    def norm(self, x: mx.array, *_: object, **__: object) -> mx.array:
        """In mx.fast.rms_norm's place, which is one launch on a GPU and many operations on a CPU."""
        self.launches["rms_norm"] += 1
        return _behind([(x.shape, x.dtype)], [x])[0]

    def rotate(self, x: mx.array, *_: object, **__: object) -> mx.array:
        """In mx.fast.rope's place, likewise."""
        self.launches["rope"] += 1
        return _behind([(x.shape, x.dtype)], [x])[0]

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        self.launches[source.name] += 1
        return _behind(launch.outputs, launch.inputs)


def _behind(outputs: Iterable[tuple[tuple[int, ...], mx.Dtype]], inputs: Iterable[mx.array]) -> list[mx.array]:
    """Arrays that the graph takes for computed from `inputs`."""
    made: list[mx.array] = mx.depends([mx.zeros(shape, dtype) for shape, dtype in outputs], list(inputs))
    return made


def launches(config: dict[str, Any], layers: int) -> int:
    """Of a decode step of one sequence in a model of so many layers: ours, and MLX's operations that are no view."""
    classes = import_module(f"mlx_lm.models.{config['model_type']}")
    module: nn.Module = classes.Model(classes.ModelArgs.from_dict(config | {"num_hidden_layers": layers}))
    mx.eval(module.parameters())
    model, launcher = prepare(module, config["model_type"]), Counting()
    pool = PagedPool(single_group_layout(model.layers, 16, 8), model.dtype)
    attention = KernelAttention(
        pool, launcher, Gpu(Family.CUDA, 1)
    )  # of this family no layer's evaluation is begun early
    one = np.zeros(1, np.int32)
    batch = Batch((Sequence("0", 0, 1, ((1,),)),), one, one, one, one, ("0",), {})
    step = KernelStep(attention.kernels, BatchPlans(attention.kernels, batch), attention.kernels.ordered, starts=False)
    text = io.StringIO()
    with patch.object(mx.fast, "rms_norm", launcher.norm), patch.object(mx.fast, "rope", launcher.rotate):
        mx.export_to_dot(text, model(one, one, step, one))
    named = re.findall(r'label ?="([A-Za-z]+)"', text.getvalue())
    return launcher.launches.total() + sum(name not in VIEWS for name in named)


def main() -> None:
    """See the module."""
    chips = [CHIPS[chip] for chip in WANTED]
    rows = []
    for release in RELEASES:
        two, three = launches(release.config, 2), launches(release.config, 3)
        weights, cached = release.bytes_read(CONTEXT)
        layer = three - two
        least = [f"{(weights + cached) / chip.bandwidth * 1e3:.1f}" for chip in chips]
        count = two + (release.layers - 2) * layer
        rows.append([release.name, str(layer), str(count), f"{weights / 1e9:.1f}", f"{cached / 1e9:.2f}", *least])
    heads = ["model", "launches a layer", "a step", "GB of weights", f"GB of K and V, {CONTEXT} tokens"]
    print(table([*heads, *(f"{chip.name}, {chip.gpu_cores} cores: least ms" for chip in chips)], rows))


if __name__ == "__main__":
    main()
