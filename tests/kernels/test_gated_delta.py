"""Gated-delta kernels against float64 numpy, MLX's own operation and mlx-lm's modules, on ragged, scrambled steps."""

import dataclasses
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from emulator.counting import CountingLauncher
from emulator.launcher import EmulatedLauncher
from hybrid_models import ONE_SLOT, HybridDriver, build_hybrid, paged_hybrid
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.kernels.cache_writes import RESHAPE_AND_CACHE, UNSET
from pomarium.kernels.cases.gated_delta import (
    BOUNDS,
    Inputs,
    expected_conv,
    expected_recurrent,
    float64,
    random_inputs,
    run_conv,
    run_recurrent,
)
from pomarium.kernels.gated_delta import (
    CONV_TILE,
    FRESH,
    NULL_SLOT,
    THREADGROUP_BYTES,
    GatedDeltaShape,
    conv1d_silu,
    plan,
    plan_decode,
    recurrent,
    tile_tokens,
)
from pomarium.kernels.gated_delta import SOURCES as GATED_DELTA
from pomarium.kernels.gpu_family import H100
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered
from pomarium.kernels.paged_attention import SOURCES as PAGED_ATTENTION
from pomarium.worker.attention.kernels import KernelAttention
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import StateCache, StateLayout, single_group_states
from pomarium.worker.models.gated_delta_kernels import KernelStateBackend, shape_of, state_backend
from pomarium.worker.models.paged import prepare

SHAPE = GatedDeltaShape(1, 2, 48, 16, 4, 12, mx.float32)
BOUND = BOUNDS[mx.float32]


@pytest.fixture(scope="module")
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Lengths, half of the time all one; slots new, kept or moved on from; a seed."""
    count = draw(st.integers(1, 5))
    longest = draw(st.sampled_from([1, 70]))
    lengths = draw(st.lists(st.integers(1, longest), min_size=count, max_size=count))
    slots = np.array(draw(st.permutations(range(SHAPE.num_slots))))[: 2 * count].reshape(count, 2)
    for row, start in zip(
        slots, draw(st.lists(st.sampled_from(["new", "kept", "moved"]), min_size=count)), strict=False
    ):
        row[0] = {"new": FRESH, "kept": row[1], "moved": row[0]}[start]
    return np.array(lengths), slots, draw(st.integers(0, 99))


@pytest.mark.parametrize(
    ("run", "expected"), [(run_conv, expected_conv), (run_recurrent, expected_recurrent)], ids=["conv", "recurrent"]
)
@settings(max_examples=25, deadline=None)
@given(step=steps())
def test_ragged_steps(
    launcher: Launcher,
    run: Callable[[Launcher, Inputs], list[mx.array]],
    expected: Callable[[Inputs], tuple[np.ndarray, np.ndarray]],
    step: tuple[np.ndarray, np.ndarray, int],
) -> None:
    """Outputs and new states are right, and every other slot keeps its bits."""
    lengths, slots, seed = step
    inputs = random_inputs(SHAPE, lengths, slots, seed)
    y, pool, _ = run(launcher, inputs)
    want_y, want_pool = expected(inputs)
    written = slots[:, 1]
    for got, want in ((float64(y), want_y), (float64(pool)[written], want_pool[written])):
        # A single token of a new sequence may be small by cancellation in q . k, of unit vectors.
        assert np.abs(got - want).max() <= BOUND * max(0.1, np.abs(want).max())
    others = np.setdiff1d(np.arange(SHAPE.num_slots), written)
    np.testing.assert_array_equal(float64(pool)[others], want_pool[others])


def test_recurrence_agrees_with_mlx(launcher: Launcher) -> None:
    """mx.fast.gated_delta_update on one long sequence, given its norms and gates."""
    shape = GatedDeltaShape(2, 4, 32, 16, 4, 3, mx.float32)
    inputs = random_inputs(shape, np.array([33]), np.array([[2, 1]]), 5)
    y, pool, _ = run_recurrent(launcher, inputs)
    q, k, v = mx.split(inputs.x, [64, 128], axis=-1)
    q, k = (part.reshape(1, 33, 2, 32) for part in (q, k))
    q, k = (part * mx.rsqrt(part.square().sum(-1, keepdims=True) + 1e-6) for part in (q, k))
    g = mx.exp(-mx.exp(inputs.a_log) * mx.logaddexp(inputs.a + inputs.dt_bias, mx.array(0.0)))
    want_y, want_state = mx.fast.gated_delta_update(
        q * 32**-0.5, k, v.reshape(1, 33, 4, 16), g[None], mx.sigmoid(inputs.b)[None], mx.array(inputs.states[2:3])
    )
    np.testing.assert_allclose(np.array(y), np.array(want_y[0]), atol=1e-5)
    np.testing.assert_allclose(np.array(pool[1]), np.array(want_state).reshape(pool[1].shape), atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 5, CONV_TILE])
def test_chunks_change_nothing(launcher: Launcher, cut: int) -> None:
    """A sequence in two steps gives what it gives in one, states included."""
    length = CONV_TILE + 9
    whole = random_inputs(SHAPE, np.array([length]), np.array([[FRESH, 4]]), 3)
    for run in (run_conv, run_recurrent):
        want_y, want_pool, _ = run(launcher, whole)
        first = dataclasses.replace(whole, lengths=np.array([cut]), **_rows(whole, 0, cut))
        first_y, first_pool, _ = run(launcher, first)
        carried = {"conv" if run is run_conv else "states": float64(first_pool).astype(np.float32)}
        rest = dataclasses.replace(
            whole,
            lengths=np.array([length - cut]),
            slots=np.array([[4, 4]]),
            **_rows(whole, cut, length),
            **carried,
        )
        rest_y, rest_pool, _ = run(launcher, rest)
        got = np.concatenate([float64(first_y), float64(rest_y)])
        np.testing.assert_allclose(got, float64(want_y), atol=2e-6)
        np.testing.assert_allclose(float64(rest_pool)[4], float64(want_pool)[4], atol=2e-6)


def _rows(inputs: Inputs, first: int, end: int) -> dict[str, mx.array]:
    return {name: mx.contiguous(getattr(inputs, name)[first:end]) for name in ("x", "a", "b")}


def test_writes_are_read_by_the_next_launch(launcher: Launcher) -> None:
    """Three steps queued at once, each going on from the one before, through one Ordered."""
    inputs = random_inputs(SHAPE, np.array([3]), np.array([[FRESH, 4]]), 8)
    array = mx.array(inputs.states)
    mx.eval(array)
    pool, outputs = Ordered(array), []
    for token in range(3):
        step = plan(np.array([1]), np.array([[4 if token else FRESH, 4]]), SHAPE.num_slots)
        rows = _rows(inputs, token, token + 1)
        outputs.append(
            recurrent(launcher, pool, SHAPE, step, rows["x"], rows["a"], rows["b"], inputs.a_log, inputs.dt_bias)
        )
    mx.eval(outputs, pool.arrays)
    want, _ = expected_recurrent(inputs)
    np.testing.assert_allclose(float64(mx.concatenate(outputs)), want, atol=1e-6)


def test_what_a_decode_step_is_padded_with_stores_nothing(launcher: Launcher) -> None:
    """Two sequences in a step of five rows, whose other inputs are not-a-numbers: every other slot keeps its bits."""
    slots = np.array([[FRESH, 7], [3, 5]])
    inputs = random_inputs(SHAPE, np.array([1, 1]), slots, 4)
    step = plan_decode(slots, SHAPE.num_slots, 5)
    x, a, b = (
        mx.concatenate([rows, mx.full((3, rows.shape[1]), np.nan, rows.dtype)])
        for rows in (inputs.x, inputs.a, inputs.b)
    )
    conv, states = mx.array(inputs.conv.astype(np.float32)), mx.array(inputs.states)
    mx.eval(conv, states)
    pools = Ordered(conv), Ordered(states)
    got = (
        conv1d_silu(launcher, pools[0], SHAPE, step, x, inputs.weight),
        recurrent(launcher, pools[1], SHAPE, step, x, a, b, inputs.a_log, inputs.dt_bias),
    )
    mx.eval(got, pools[0].arrays, pools[1].arrays)
    for y, pool, (want_y, want_pool) in zip(
        got, pools, (expected_conv(inputs), expected_recurrent(inputs)), strict=True
    ):
        np.testing.assert_allclose(float64(y)[:2], want_y, atol=2e-6)
        np.testing.assert_allclose(float64(pool.arrays[0]), want_pool, atol=2e-6)


def test_the_null_slot_alone_may_be_written_by_several_sequences() -> None:
    lengths, slots = np.array([1, 2]), np.array([[FRESH, NULL_SLOT]] * 2)
    assert plan(lengths, slots, 12).rows == 3
    with pytest.raises(ValueError, match="goes on from a slot that another one writes"):
        plan(lengths, np.array([[FRESH, NULL_SLOT], [NULL_SLOT, 2]]), 12)
    with pytest.raises(ValueError, match="2 sequences do not fit 1 rows"):
        plan_decode(slots, 12, 1)


def test_tiles_fit_threadgroup_memory() -> None:
    for key_dim in range(16, 257, 16):
        tokens = tile_tokens(key_dim, 32)
        assert tokens in (4, 8, 16)
        assert 4 * tokens * (2 * key_dim + 34) <= THREADGROUP_BYTES


PLANS = {
    "two tables": (np.array([1, 2]), np.array([[0, 1]]), r"slots \(1, 2\) do not fit lengths \(2,\)"),
    "no tokens": (np.array([1, 0]), np.array([[0, 1], [2, 3]]), "sequence 1 has no tokens"),
    "slot beyond the pool": (np.array([1]), np.array([[0, 12]]), "slots 0 to 12 lie outside a pool of 12"),
    "negative slot": (np.array([1]), np.array([[0, -1]]), "lie outside a pool of 12"),
    "slot before the fresh one": (np.array([1]), np.array([[-2, 1]]), "lie outside a pool of 12"),
    "one slot written twice": (np.array([1, 1]), np.array([[0, 1], [2, 1]]), r"two sequences write one of .*\[1, 1\]"),
    "read and written": (np.array([1, 1]), np.array([[0, 1], [1, 2]]), "goes on from a slot that another one writes"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_cannot_be_right_are_refused(name: str) -> None:
    lengths, slots, message = PLANS[name]
    with pytest.raises(ValueError, match=message):
        plan(lengths, slots, 12)


UNSUPPORTED = {
    "float64-like dtype": ({"dtype": mx.int32}, "int32"),
    "uneven heads": ({"value_heads": 3, "key_heads": 2}, "3 value heads over 2 key heads"),
    "key width": ({"key_dim": 40}, "key heads of 40"),
    "wide keys": ({"key_dim": 272}, "key heads of 272"),
    "value width": ({"value_dim": 12}, "value heads of 12"),
    "kernel size": ({"kernel_size": 9}, "convolution over 9 tokens"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_shapes_that_the_kernels_do_not_take(name: str) -> None:
    changes, message = UNSUPPORTED[name]
    assert message in (dataclasses.replace(SHAPE, **changes).unsupported or "")
    assert SHAPE.unsupported is None


class NoLaunch:
    """A launcher that must not be reached."""

    def launch(self, source: object, launch: object) -> list[mx.array]:
        raise AssertionError("launched")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": mx.zeros((4, 128))}, r"\(4, 128\) of mlx.core.float32 is not \(5, 128\)"),
        ({"x": mx.zeros((5, 128), mx.float16)}, "float16 is not"),
        ({"weight": mx.zeros((128, 3))}, r"weight \(128, 3\)"),
        ({"conv": np.zeros((12, 2, 128))}, r"conv \(12, 2, 128\)"),
    ],
)
def test_arrays_that_do_not_fit_the_convolution(changed: dict[str, object], message: str) -> None:
    inputs = dataclasses.replace(random_inputs(SHAPE, np.array([5]), np.array([[0, 1]]), 0), **changed)
    with pytest.raises(ValueError, match=message):
        run_conv(NoLaunch(), inputs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": mx.zeros((5, 127))}, r"qkv \(5, 127\)"),
        ({"a": mx.zeros((5, 3))}, r"a \(5, 3\)"),
        ({"b": mx.zeros((5, 2), mx.bfloat16)}, "b .*bfloat16"),
        ({"a_log": mx.zeros((1,))}, r"a_log \(1,\)"),
        ({"dt_bias": mx.zeros((2,), mx.int32)}, "dt_bias .*int32"),
        ({"states": np.zeros((11, 2, 16, 48), np.float32)}, r"states \(11, 2, 16, 48\)"),
    ],
)
def test_arrays_that_do_not_fit_the_recurrence(changed: dict[str, object], message: str) -> None:
    inputs = dataclasses.replace(random_inputs(SHAPE, np.array([5]), np.array([[0, 1]]), 0), **changed)
    with pytest.raises(ValueError, match=message):
        run_recurrent(NoLaunch(), inputs)


@pytest.mark.parametrize(("run", "changes"), [(run_conv, {"dtype": mx.int32}), (run_recurrent, {"key_dim": 40})])
def test_a_shape_that_no_kernel_takes_is_refused(
    run: Callable[[Launcher, Inputs], list[mx.array]], changes: dict[str, object]
) -> None:
    inputs = random_inputs(SHAPE, np.array([5]), np.array([[0, 1]]), 0)
    with pytest.raises(ValueError, match=r"the gated-delta kernels do not take (dtype .*int32|key heads of 40)"):
        run(NoLaunch(), dataclasses.replace(inputs, shape=dataclasses.replace(SHAPE, **changes)))


def test_a_plan_over_other_pools_is_refused() -> None:
    step, shape = plan(np.array([1]), np.array([[FRESH, 19]]), 20), dataclasses.replace(SHAPE, num_slots=12)
    row, gate = mx.zeros((1, SHAPE.channels)), mx.zeros((1, 2))
    pools = Ordered(mx.zeros((12, 3, SHAPE.channels))), Ordered(mx.zeros((12, 2, 16, 48)))
    with pytest.raises(ValueError, match="a plan over 20 slots does not fit pools of 12"):
        conv1d_silu(NoLaunch(), pools[0], shape, step, row, mx.zeros((SHAPE.channels, 4)))
    with pytest.raises(ValueError, match="a plan over 20 slots does not fit pools of 12"):
        recurrent(NoLaunch(), pools[1], shape, step, row, gate, gate, mx.zeros((2,)), mx.zeros((2,)))


def poisoned_kernels(launcher: Launcher) -> Callable[[StateLayout], KernelStateBackend]:
    """Makes the kernels' backend, its pools full of not-a-numbers."""

    def make(layout: StateLayout) -> KernelStateBackend:
        backend = state_backend(layout, launcher)
        assert isinstance(backend, KernelStateBackend)
        for buffer, pools in backend.pools.items():
            arrays = [mx.full(pool.arrays[0].shape, np.nan, pool.arrays[0].dtype) for pool in pools]
            mx.eval(arrays)
            backend.pools[buffer] = (Ordered(arrays[0]), Ordered(arrays[1]))
        return backend

    return make


@pytest.mark.parametrize(("name", "tokens_per_slot"), [("qwen3_next", ONE_SLOT), ("qwen3_5_moe", 8)])
def test_hybrid_models_give_the_same_tokens(launcher: Launcher, name: str, tokens_per_slot: int) -> None:
    """End to end through the model runner: chunked prompts, decode, a preempted request."""
    rng = np.random.default_rng(0)
    prompts = {str(length): rng.integers(3, 120, length).tolist() for length in (1, 5, 16, 43)}
    eager = HybridDriver(paged_hybrid(name), 8)
    want = eager.run(prompts, 8, chunks=(7, 1, 16, 50))
    driver = HybridDriver(paged_hybrid(name), 8, tokens_per_slot=tokens_per_slot, states=poisoned_kernels(launcher))
    got = driver.run(prompts, 8, chunks=(50, 2, 9), preempt=lambda step: ["43"] if step == 3 else [])
    assert got == want
    for request, rows in eager.recorder.logits.items():
        for position, row in rows.items():
            assert np.abs(driver.recorder.logits[request][position] - row).max() <= 2e-5 * np.abs(row).max()


def test_all_layers_of_a_hybrid_model_through_kernels(launcher: EmulatedLauncher) -> None:
    """Attention heads of 64, so that those layers take their kernels, too."""
    model = prepare(build_hybrid("qwen3_5", head_dim=64, num_hidden_layers=3), "qwen3_5")
    prompts = {"one": [5], "some": list(range(3, 43))}
    want = HybridDriver(model, 8).run(prompts, 4, chunks=(37,))

    counting = CountingLauncher(launcher)

    def attention(pool: PagedPool) -> KernelAttention:
        return KernelAttention(pool, counting, H100)

    driver = HybridDriver(model, 8, states=poisoned_kernels(counting), attention=attention)
    assert driver.run(prompts, 4, chunks=(37,)) == want
    names = {source.name for source in (RESHAPE_AND_CACHE, UNSET, *PAGED_ATTENTION, *GATED_DELTA)}
    assert set(counting.launches) == names


def test_states_that_no_kernel_takes_run_as_operations(launcher: Launcher, caplog: pytest.LogCaptureFixture) -> None:
    layout = single_group_states([StateCache((3, 2 * 24 + 2 * 8), (2, 8, 24), mx.float32)], 16, 4)
    assert shape_of(layout).key_heads == 1
    with caplog.at_level("INFO"):
        assert not isinstance(state_backend(layout, launcher), KernelStateBackend)
    assert "no kernel takes key heads of 24" in caplog.text
    assert not isinstance(state_backend(layout, None), KernelStateBackend)


def test_states_of_other_layers_are_refused() -> None:
    layout = single_group_states([StateCache((3, 40), (2, 8, 16), mx.float32)], 16, 4)
    with pytest.raises(ValueError, match="does not fit states"):
        shape_of(layout)
