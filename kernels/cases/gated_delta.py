"""Sample launches of the gated-delta kernels, with what they must give: float64 numpy on fresh random inputs.

Pools have more slots than sequences, scrambled, and not-a-numbers wherever nothing may be read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.kernels.cases.case import Case
from pomarium.kernels.cases.order import LAST_TOKEN, ordered
from pomarium.kernels.gated_delta import FRESH, GatedDeltaPlan, GatedDeltaShape, conv1d_silu, plan, recurrent
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered

BOUNDS = {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 6e-3}
"""Relative to the largest expected value: one rounding to the outputs' dtype, and float32 sums in another order."""


@dataclass(frozen=True)
class Inputs:
    """One random step.

    Attributes:
        lengths: (S,). slots: (S, 2), as `gated_delta.plan` takes them.
        x: (T, channels). weight: (channels, kernel_size). a, b: (T, value_heads). a_log, dt_bias: (value_heads,).
        conv: (num_slots, kernel_size - 1, channels). states: (num_slots, value_heads, value_dim, key_dim). Pools hold
            not-a-numbers in slots that no sequence goes on from.
    """

    shape: GatedDeltaShape
    lengths: np.ndarray
    slots: np.ndarray
    x: mx.array
    weight: mx.array
    a: mx.array
    b: mx.array
    a_log: mx.array
    dt_bias: mx.array
    conv: np.ndarray
    states: np.ndarray


def random_inputs(shape: GatedDeltaShape, lengths: np.ndarray, slots: np.ndarray, seed: int) -> Inputs:
    """Inputs of a step; keys and queries of unlike norms, decays from nearly none to nearly all."""
    rng = np.random.default_rng(seed)
    rows, heads = int(lengths.sum()), shape.value_heads

    def rounded(*size: int) -> mx.array:
        return mx.array(rng.normal(size=size).astype(np.float32)).astype(shape.dtype)

    conv = float64(rounded(shape.num_slots, shape.kernel_size - 1, shape.channels))
    states = rng.normal(size=(shape.num_slots, heads, shape.value_dim, shape.key_dim)).astype(np.float32)
    unread = np.setdiff1d(np.arange(shape.num_slots), slots[:, 0])
    conv[unread], states[unread] = np.nan, np.nan
    return Inputs(
        shape,
        lengths,
        slots,
        rounded(rows, shape.channels),
        rounded(shape.channels, shape.kernel_size),
        rounded(rows, heads) * 3,
        rounded(rows, heads),
        mx.array(rng.uniform(-3, 2, heads).astype(np.float32)),
        rounded(heads),
        conv,
        states,
    )


def float64(array: mx.array) -> np.ndarray:
    """On the host."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def expected_conv(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(T, channels) outputs and the pool afterwards, float64."""
    x, weight = float64(inputs.x), float64(inputs.weight)
    size, pool, y, first = inputs.shape.kernel_size, inputs.conv.copy(), np.empty(inputs.x.shape), 0
    for length, (start, end) in zip(inputs.lengths, inputs.slots, strict=True):
        old = np.zeros((size - 1, x.shape[1])) if start == FRESH else inputs.conv[start]
        seen = np.concatenate([old, x[first : first + length]])
        for token in range(length):
            total = (seen[token : token + size] * weight.T).sum(0)
            y[first + token] = total / (1 + np.exp(-total))
        pool[end] = seen[length:]
        first += length
    return y, pool


def expected_recurrent(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """(T, value_heads, value_dim) outputs of `inputs.x` as q, k, v, and the pool afterwards, float64."""
    shape, rows = inputs.shape, len(inputs.x)
    q, k, v = np.split(float64(inputs.x), np.cumsum([shape.key_heads * shape.key_dim] * 2), axis=1)
    group = shape.value_heads // shape.key_heads
    q, k = (np.repeat(_normalised(part.reshape(rows, shape.key_heads, -1)), group, axis=1) for part in (q, k))
    q = q / np.sqrt(shape.key_dim)
    v = v.reshape(rows, shape.value_heads, shape.value_dim)
    decay = np.exp(-np.exp(float64(inputs.a_log)) * np.logaddexp(float64(inputs.a) + float64(inputs.dt_bias), 0))
    beta = 1 / (1 + np.exp(-float64(inputs.b)))
    pool, y, first = inputs.states.astype(np.float64), np.empty(v.shape), 0
    for length, (start, end) in zip(inputs.lengths, inputs.slots, strict=True):
        state = np.zeros(pool.shape[1:]) if start == FRESH else inputs.states[start].astype(np.float64)
        for token in range(first, first + length):
            state *= decay[token][:, None, None]
            delta = (v[token] - np.einsum("hvk,hk->hv", state, k[token])) * beta[token][:, None]
            state += delta[..., None] * k[token][:, None]
            y[token] = np.einsum("hvk,hk->hv", state, q[token])
        pool[end] = state
        first += length
    return y, pool


def _normalised(heads: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = heads / np.sqrt((heads**2).sum(-1, keepdims=True) + 1e-6)
    return normalised


def run_conv(launcher: Launcher, inputs: Inputs) -> list[mx.array]:
    """Outputs, pool and token of the convolution kernels."""
    conv = mx.array(inputs.conv.astype(np.float32)).astype(inputs.shape.dtype)
    return _run(
        conv, inputs, lambda pool, step: conv1d_silu(launcher, pool, inputs.shape, step, inputs.x, inputs.weight)
    )


def run_recurrent(launcher: Launcher, inputs: Inputs) -> list[mx.array]:
    """Outputs, pool and token of the recurrence kernels."""
    return _run(
        mx.array(inputs.states),
        inputs,
        lambda pool, step: recurrent(
            launcher, pool, inputs.shape, step, inputs.x, inputs.a, inputs.b, inputs.a_log, inputs.dt_bias
        ),
    )


def _run(array: mx.array, inputs: Inputs, use: Callable[[Ordered, GatedDeltaPlan], mx.array]) -> list[mx.array]:
    mx.eval(array)
    pool = ordered(array)
    y = use(pool, plan(inputs.lengths, inputs.slots, inputs.shape.num_slots))
    mx.eval(y, pool.arrays)
    return [y, *pool.arrays]


def scrambled_slots(count: int, num_slots: int, seed: int) -> np.ndarray:
    """(S, 2): every third sequence new, others going on in place or, as in vLLM's mode "align", in another slot.

    One goes on from slot 0, which looks most like none, and one from the last slot, behind which there is nothing.
    """
    slots = np.random.default_rng(seed).permutation(np.arange(1, num_slots - 1))[: 2 * count].reshape(count, 2)
    slots[1, 1] = num_slots - 1
    slots[2, 0] = 0
    slots[::3, 0] = FRESH
    slots[1::3, 0] = slots[1::3, 1]
    return slots


_SHAPES = {
    "Qwen3-Next": GatedDeltaShape(2, 4, 128, 128, 4, 12, mx.float32),
    "Qwen3-Next, bfloat16": GatedDeltaShape(2, 4, 128, 128, 4, 12, mx.bfloat16),
    "narrow": GatedDeltaShape(1, 3, 48, 8, 3, 12, mx.float32),
    "wide keys": GatedDeltaShape(1, 1, 192, 16, 4, 12, mx.float16),
}
_STEPS = {"decode": (1, 1, 1, 1, 1), "prefill": (70, 1, 2, 17)}


def cases(seed: int = 0) -> Iterator[Case]:
    """Each kernel in each dtype, decode and ragged prefill."""
    for name, shape in _SHAPES.items():
        for step, lengths in _STEPS.items():
            slots = scrambled_slots(len(lengths), shape.num_slots, seed)
            inputs = random_inputs(shape, np.array(lengths), slots, seed)
            bound = BOUNDS[shape.dtype]
            yield _case(f"gdn_conv1d_silu_{step}, {name}", inputs, run_conv, expected_conv, bound)
            yield _case(f"gdn_recurrent_{step}, {name}", inputs, run_recurrent, expected_recurrent, bound)


def _case(
    name: str,
    inputs: Inputs,
    run: Callable[[Launcher, Inputs], list[mx.array]],
    expected: Callable[[Inputs], tuple[np.ndarray, np.ndarray]],
    bound: float,
) -> Case:
    written = inputs.slots[:, 1]

    def launched(launcher: Launcher) -> list[mx.array]:
        y, pool, token = run(launcher, inputs)
        return [y, mx.take(pool, mx.array(written.astype(np.int32)), axis=0), token]

    def wanted() -> list[np.ndarray]:
        y, pool = expected(inputs)
        return [y, pool[written], np.array([LAST_TOKEN])]

    return Case(name, launched, wanted, bound)
