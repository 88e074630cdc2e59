"""Times gated-delta layers on a GPU: kernels over states in place, beside mlx-lm's module over gathered states.

    python benchmarks/gated_delta_layer.py           # Qwen3-Next's layer in bfloat16, decode and prefill; medians

Needs mlx, mlx-lm and numpy, no vLLM. Both ways run the same projections; the table says how much of each time they are.
Each repetition is one step through several layers, one behind the other as in a model, evaluated with its new states;
times are one layer's share. Outputs of the first step are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.qwen3_next import ModelArgs, Qwen3NextGatedDeltaNet

from pomarium.kernels.launch import CudaLauncher, Launcher, MetalLauncher
from pomarium.worker.attention.hybrid import EagerStateBackend, ModuleCall, StateBackend
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.kv_cache.states import StateCache, StateLayout, StatePool, single_group_states
from pomarium.worker.models.gated_delta_kernels import KernelStateBackend, project, state_backend

LAYERS = 8
"""Of a step."""

HIDDEN, KEY_HEADS, VALUE_HEADS, WIDTH, KERNEL = 2048, 16, 32, 128, 4
STEPS = {
    "decode, 1 stream": (1,),
    "decode, 8 streams": (1,) * 8,
    "decode, 32 streams": (1,) * 32,
    "prefill, 1 x 512": (512,),
    "prefill, 8 x 64": (64,) * 8,
    "mixed, 31 streams and 256": (1,) * 31 + (256,),
}
PREFILL_ROUNDS = 5
"""Repetitions of steps with prompts: mlx-lm's module builds its graph token by token where it has no kernel."""


def layer() -> Qwen3NextGatedDeltaNet:
    """Random weights, bfloat16."""
    arguments = {name: 1 for name in ModelArgs.__dataclass_fields__ if name not in ("rope_scaling", "mlp_only_layers")}
    arguments |= {
        "model_type": "qwen3_next",
        "hidden_size": HIDDEN,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "linear_key_head_dim": WIDTH,
        "linear_value_head_dim": WIDTH,
        "linear_conv_kernel_dim": KERNEL,
        "mlp_only_layers": [],
    }
    module = Qwen3NextGatedDeltaNet(ModelArgs(**arguments))
    module.update(tree_map(lambda weight: weight.astype(mx.bfloat16), module.parameters()))
    mx.eval(module.parameters())
    return module


def batch_of(lengths: tuple[int, ...], start: int) -> Batch:
    """A step of sequences of `start` tokens that go on, each in a slot of its own."""
    sequences = tuple(Sequence(str(number), start, length, ((number + 1,),)) for number, length in enumerate(lengths))
    rows = np.arange(sum(lengths), dtype=np.int32)
    return Batch(sequences, rows, rows, rows[:0], rows[:0], (), {})


def median_ms(step: Callable[[], object], rounds: int) -> float:
    """One layer's share of `rounds` runs behind three that are not counted."""
    times = []
    for number in range(rounds + 3):
        began = time.perf_counter()
        step()
        if number >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3 / LAYERS


def layer_step(backend: StateBackend, module: Qwen3NextGatedDeltaNet, batch: Batch, inputs: mx.array) -> mx.array:
    """One step through LAYERS layers of the same weights, each with states of its own, evaluated."""
    call: ModuleCall = lambda rows, mask, states: module(rows, mask, states)  # noqa: E731
    step = backend.prepare(batch)
    for index in range(LAYERS):
        inputs = inputs + step.run(index, module, call, inputs)
    mx.eval(inputs, backend.arrays)
    return inputs


def projections(module: Qwen3NextGatedDeltaNet, inputs: mx.array) -> None:
    """What both ways have in common, LAYERS times, evaluated."""
    for _ in range(LAYERS):
        made = project(module, inputs)
        inputs = inputs + module.out_proj(mx.flatten(made.z, 2)) + (made.qkv[:1, :1] + made.a[:1, :1] + made.b[:1, :1])
    mx.eval(inputs)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="repetitions of decode steps")
    options = parser.parse_args()
    launcher: Launcher = MetalLauncher() if mx.metal.is_available() else CudaLauncher()
    module = layer()
    channels = 2 * KEY_HEADS * WIDTH + VALUE_HEADS * WIDTH
    cache = StateCache((KERNEL - 1, channels), (VALUE_HEADS, WIDTH, WIDTH), mx.bfloat16)
    print("| one layer of a step | mlx-lm's module, ms | kernels, ms | times faster | projections, ms | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, lengths in STEPS.items():
        layout: StateLayout = single_group_states([cache] * LAYERS, 1 << 20, len(lengths) + 1)
        eager = EagerStateBackend(StatePool(layout))
        kernels = state_backend(layout, launcher)
        assert isinstance(kernels, KernelStateBackend)
        new, batch = batch_of(lengths, 0), batch_of(lengths, 100)
        inputs = mx.random.normal((sum(lengths), 1, HIDDEN)).astype(mx.bfloat16)
        want, got = (layer_step(backend, module, new, inputs).astype(mx.float32) for backend in (eager, kernels))
        difference = (mx.abs(want - got).max() / mx.abs(want).max()).item()
        rounds = options.rounds if max(lengths) == 1 else PREFILL_ROUNDS
        slow = median_ms(partial(layer_step, eager, module, batch, inputs), rounds)
        fast = median_ms(partial(layer_step, kernels, module, batch, inputs), rounds)
        share = median_ms(partial(projections, module, inputs), rounds)
        print(f"| {name} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f} | {share:.3f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
