"""Is the emulator right? MLX's own kernels give numpy's results on it, and planted faults of every kind are seen.

The kernels are those of MLX's package (mlx/include/.../kernels): what they compute on Apple GPUs is known, so an
emulator that read their language otherwise would show here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx
import mlx.core as mx
import numpy as np
import pytest
from emulator.build import CompileError, compiler, messages
from emulator.capture import capture
from emulator.frontend import NotMetalError, check
from emulator.inline import InlineSource
from emulator.launcher import EmulatedLauncher
from emulator.run import Buffer, KernelError, Machine, Order, compiled
from emulator.translate import MetalText, checkable

from pomarium.kernels.launch import Launch

SHIPPED = Path(next(iter(mlx.__path__))) / "include" / "mlx" / "backend" / "metal" / "kernels"


@pytest.fixture(scope="module")
def machine() -> Machine:
    compiler()
    return Machine()


def argument(array: np.ndarray | int | float, writable: bool = False) -> Buffer:
    held = np.atleast_1d(np.asarray(array))
    return Buffer("argument", held.reshape(-1).view(np.uint8), held.itemsize, writable)


def rounded(array: np.ndarray, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """In `dtype`, as bits and as float64."""
    converted = mx.array(array.astype(np.float32)).astype(dtype)
    bits = converted.view({4: mx.uint32, 2: mx.uint16}[dtype.size])
    return np.array(bits), np.array(converted.astype(mx.float32)).astype(np.float64)


def unwritten(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray:
    return np.full(shape, -1, {4: np.int32, 2: np.int16}[dtype.size])


def floats(bits: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(bits).view(dtype).astype(mx.float32))


# ---- MLX's kernels ----


@dataclass(frozen=True)
class Attention:
    """A case of sdpa_vector. mask, causal and sinks are mutually independent features of it."""

    dtype: mx.Dtype
    name: str
    dim: int
    heads: int
    kv_heads: int
    keys: int
    bound: float
    queries: int = 1
    masked: bool = False
    causal: bool = False
    sinks: bool = False


ATTENTIONS = [
    Attention(mx.float32, "float", 64, 4, 2, 77, 1e-6, sinks=True),
    Attention(mx.float32, "float", 96, 2, 2, 5, 1e-6, masked=True),
    Attention(mx.float16, "half", 128, 4, 1, 40, 5e-4, queries=3, causal=True),
    Attention(mx.bfloat16, "bfloat16_t", 64, 2, 2, 33, 4e-3, sinks=True),
]


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("case", ATTENTIONS, ids=lambda case: f"{case.name} {case.dim}")
def test_mlx_sdpa_vector(case: Attention, order: Order, machine: Machine) -> None:
    rng = np.random.default_rng(case.dim)
    heads, dim, keys, rows = case.heads, case.dim, case.keys, case.queries
    q_bits, q = rounded(rng.normal(size=(heads, rows, dim)), case.dtype)
    k_bits, k = rounded(rng.normal(size=(case.kv_heads, keys, dim)), case.dtype)
    v_bits, v = rounded(rng.normal(size=(case.kv_heads, keys, dim)), case.dtype)
    s_bits, sinks = rounded(rng.normal(size=heads), case.dtype)
    mask = rng.random((rows, keys)) < 0.6
    scale = np.float32(dim**-0.5)
    features = {
        "has_mask": case.masked,
        "bool_mask": case.masked,
        "do_causal": case.causal,
        "has_sinks": case.sinks,
    }
    text = '#include "mlx/backend/metal/kernels/utils.h"\n' + (SHIPPED / "sdpa_vector.h").read_text()
    constants = tuple((name, int(on)) for name, on in features.items())
    out = unwritten((heads, rows, dim), case.dtype)
    sizes = [np.int32(heads // case.kv_heads), np.int32(keys)]
    strides = [np.uint64(keys * dim), np.uint64(dim)] * 2
    tail = [np.uint8(mask), q_bits, np.int32(1), np.int32(keys), np.int32(0), s_bits, np.int32(heads)]
    buffers = [argument(x) for x in (q_bits, k_bits, v_bits, out, *sizes, *strides, scale, *tail)]
    buffers[3] = argument(out, writable=True)
    kernel = compiled(MetalText(text, "sdpa_vector", f"<{case.name}, {dim}, {dim}>", constants))
    kernel.run(machine, buffers, (heads * 1024, rows, 1), (1024, 1, 1), order)

    k, v = (np.repeat(x, heads // case.kv_heads, axis=0) for x in (k, v))
    scores = np.einsum("hqd,hkd->hqk", q, k) * float(scale)
    seen = mask if case.masked else np.tril(np.ones((rows, keys)), keys - rows) > 0 if case.causal else np.True_
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores)
    total = weights.sum(-1) + (np.exp(sinks)[:, None] if case.sinks else 0)
    expected = np.einsum("hqk,hkd->hqd", weights / total[..., None], v)
    assert np.abs(floats(out, case.dtype) - expected).max() < case.bound


def gated_delta(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence in float64: outputs and the state afterwards."""
    group = v.shape[2] // k.shape[2]
    q, k = (np.repeat(x.astype(np.float64), group, axis=2) for x in (q, k))
    held, y = state.astype(np.float64), np.empty(v.shape)
    for t in range(q.shape[1]):
        held = held * g[:, t, :, None, None]
        delta = (v[:, t] - np.einsum("bhvk,bhk->bhv", held, k[:, t])) * beta[:, t, :, None]
        held = held + delta[..., None] * k[:, t, :, None]
        y[:, t] = np.einsum("bhvk,bhk->bhv", held, q[:, t])
    return y, held


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("function", ["gated_delta_seq", "gated_delta_fused_chunk"])
def test_mlx_gated_delta(function: str, order: Order, machine: Machine) -> None:
    """One token after another, and chunks by simdgroup matrices with a ragged end."""
    rng = np.random.default_rng(1)
    batch, tokens, key_heads, heads, dk, dv = 2, 21, 2, 4, 64, 32
    q, k = rng.normal(size=(2, batch, tokens, key_heads, dk)).astype(np.float32)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.normal(size=(batch, tokens, heads, dv)).astype(np.float32)
    g = rng.uniform(0.7, 1, (batch, tokens, heads)).astype(np.float32)
    beta = rng.uniform(0, 1, (batch, tokens, heads)).astype(np.float32)
    state = rng.normal(size=(batch, heads, dv, dk)).astype(np.float32)
    expected = gated_delta(q, k, v, g, beta, state)

    step = {"gated_delta_seq": 16, "gated_delta_fused_chunk": 8}[function]
    columns = {"gated_delta_seq": dv, "gated_delta_fused_chunk": dv // 8}[function]
    y, after = np.full(v.shape, np.nan, np.float32), np.full(state.shape, np.nan, np.float32)
    buffers = [argument(x) for x in (q, k, v, state, g, beta)]
    buffers += [argument(y, writable=True), argument(after, writable=True), argument(np.int32(tokens))]
    buffers += [argument(np.float32(0))] if function == "gated_delta_seq" else []
    text = "#define MLX_MTL_PRAGMA_UNROLL\n" + (SHIPPED / "gated_delta_update.h").read_text()
    kernel = compiled(MetalText(text, function, f"<float, {dk}, {dv}, {key_heads}, {heads}, {step}>"))
    sizes = (32, columns, batch * heads), (32, 4, 1)
    if function == "gated_delta_fused_chunk":
        # It writes gamma again behind a simd operation alone: right where lanes go in lockstep, but not promised.
        with pytest.raises(KernelError, match=r"race.*gamma_all"):
            kernel.run(machine, buffers, *sizes, order)
    kernel.run(machine, buffers, *sizes, order, lockstep=True)
    for got, want in zip((y, after), expected, strict=True):
        assert np.abs(got - want).max() < 2e-6


# ---- Launches ----

SUM = """
const int lane = int(thread_index_in_simdgroup);
const int sg = int(simdgroup_index_in_threadgroup);
const int at = int(thread_position_in_grid.x);
threadgroup float sums[4];
float own = x[at];
float total = simd_sum(own);
if (lane == 0) {
  sums[sg] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float result = 0.0f;
for (int g = 0; g < 4; g++) {
  result += sums[g];
}
y[at] = result;
"""
"""Each of 256 threads gets the sum over its threadgroup of 128."""

X = np.arange(256, dtype=np.float32)


def sum_launch(x: mx.array | None = None, size: int = 256) -> Launch:
    given = mx.array(X) if x is None else x
    return Launch((given,), (), (256, 1, 1), (128, 1, 1), (((size,), mx.float32),))


def source(body: str, in_place: tuple[str, ...] = ()) -> InlineSource:
    return InlineSource("planted", ("x",), ("y",), in_place, body)


@pytest.fixture(scope="module")
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


def result(launcher: EmulatedLauncher, body: str) -> np.ndarray:
    (y,) = launcher.launch(source(body), sum_launch())
    return np.array(y)


@pytest.mark.parametrize("order", Order)
def test_a_sum_over_threadgroups(order: Order) -> None:
    got = result(EmulatedLauncher(order), SUM)
    assert got.tolist() == np.repeat(X.reshape(2, 128).sum(1), 128).tolist()


def planted(old: str, new: str) -> str:
    assert SUM.count(old) == 1
    return SUM.replace(old, new)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
FAULTS: dict[str, tuple[str, str]] = {
    "no barrier": (planted(BARRIER, ""), r"race: no barrier between .* of sums"),
    "a barrier for other memory": (planted(BARRIER, "threadgroup_barrier(mem_flags::mem_device);\n"), "race.* of sums"),
    "a barrier of lanes only": (planted(BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);\n"), "race.* of sums"),
    "a buffer used again too early": (
        planted("y[at] = result;", "if (lane == 0) sums[sg] = result;\ny[at] = result;"),
        "race.* of sums",
    ),
    "simd operation of half the lanes": (
        planted("float total = simd_sum(own);", "float total = own;\nif (lane < 16) total = simd_sum(own);"),
        "deadlock|divergence|returned",
    ),
    "one operation in two places": (
        planted("simd_sum(own);", "lane < 16 ? simd_sum(own) :\n simd_sum(own);"),
        "divergence.* lines",
    ),
    "half the lanes load a matrix": (
        planted("float total", "simdgroup_float8x8 m;\nif (lane < 16) simdgroup_load(m, x, 8);\nfloat total"),
        "divergence.*different ways",
    ),
    "barrier in a branch": (planted(BARRIER, f"if (sg == 0) {{ {BARRIER} }}\n{BARRIER}"), "divergence.*barriers"),
    "a simdgroup returns early": (planted(BARRIER, f"if (sg == 1) return;\n{BARRIER}"), "returned"),
    "a lane returns early": (planted("float own", "if (lane == 7) return;\nfloat own"), "returned|deadlock"),
    "a read behind the end": (planted("x[at]", "x[at + 256]"), r"\d+ bytes behind the end of x"),
    "a read far before the start": (planted("x[at]", "x[at - (1 << 20)]"), r"\d+ bytes before the start of x"),
    "a write one behind the end": (planted("y[at]", "y[at + 1]"), "thread 127: 0 bytes behind the end of y"),
    "an index outside threadgroup memory": (planted("sums[sg] =", "sums[sg + 1] ="), "index outside an array"),
    "the same through a pointer": (
        planted("  sums[sg] = total;", "  threadgroup float* p = sums;\n  p[sg + 1] = total;"),
        "misses its threadgroup variable",
    ),
    "a write through const": (
        planted("float own", "const_cast<device float*>(x)[at] = 0.0f;\nfloat own"),
        r"byte \d+ of x, which is read-only",
    ),
    "threadgroups on one place": (planted("y[at]", "y[at % 128]"), "race: no order between .* of y"),
    "too much threadgroup memory": (
        planted("sums[4];", "sums[4];\nthreadgroup float more[8190];\nmore[at] = 0.0f;"),
        "threadgroup memory of 32776 bytes is over 32768",
    ),
    "a misaligned vector": (
        planted("x[at];", "packed_element<float>(reinterpret_cast<const device uint4*>(x + 1)[at / 8], at % 4);"),
        "misaligned",
    ),
    "a division by zero": (planted("x[at]", "x[at / (sg - sg)]"), "division"),
    "a shift too far": (planted("x[at]", "x[at << (32 + sg)]"), "a shift"),
    "a shuffle from beyond the simdgroup": (
        planted("simd_sum(own)", "simd_shuffle_xor(own, ushort(32))"),
        "reads lane 32, which there is not",
    ),
    "a shuffle from a lane that there is not": (
        planted("simd_sum(own)", "simd_shuffle(own, ushort(lane ^ 1))"),
        "reads lane",
    ),
}


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, order: Order) -> None:
    body, message = FAULTS[name]
    launch = sum_launch()
    if "there is not" in name:
        launch = Launch(launch.inputs, (), (33, 1, 1), (33, 1, 1), launch.outputs)
    with pytest.raises(KernelError, match=f"^planted: .*({message})"):
        EmulatedLauncher(order, seed=1).launch(source(body), launch)


def test_what_never_ends_is_stopped(machine: Machine) -> None:
    endless = planted("g < 4; g++", "g < 4; g = 0")
    kernel = compiled(capture(source(endless), sum_launch()))
    with pytest.raises(KernelError, match="no end after 1 s"):
        kernel.run(machine, [argument(X), argument(X.copy(), True)], (256, 1, 1), (128, 1, 1), most_seconds=1)
    kernel = compiled(capture(source(SUM), sum_launch()))
    kernel.run(machine, [argument(X), argument(X.copy(), True)], (256, 1, 1), (128, 1, 1), most_seconds=1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float result = 0.0f;", "float result;"),
        ("  sums[sg] = total;", "  if (sg > 0) sums[sg] = total;"),
        ("y[at] = result;", "if (at < 128) y[at] = result;"),
        ("y[at] = result;", "uint4 raw[2];\nraw[0].x = 0u;\ny[at] = result + as_type<float>(raw[1].x);"),
    ],
    ids=["a variable", "threadgroup memory", "an output", "raw bits"],
)
def test_what_is_not_initialised_becomes_no_number(old: str, new: str, machine: Machine) -> None:
    """Behind the front end, which itself sees the first."""
    y = np.full(256, -1, np.int32)
    kernel = compiled(capture(source(planted(old, new)), sum_launch()))
    kernel.run(machine, [argument(X), argument(y, writable=True)], (256, 1, 1), (128, 1, 1))
    assert np.isnan(y.view(np.float32)).any()


def test_threads_run_in_the_order_that_is_asked_for(machine: Machine) -> None:
    """Single bytes are not looked at for races: the last to write one shows."""
    body = "y[0] = uchar(threadgroup_position_in_grid.x); y[1] = uchar(thread_index_in_threadgroup);"
    launch = Launch((mx.array(X),), (), (256 * 8, 1, 1), (256, 1, 1), (((2,), mx.uint8),))
    kernel = compiled(capture(source(body), launch))

    def last(order: Order, seed: int) -> tuple[int, ...]:
        y = np.zeros(2, np.uint8)
        kernel.run(machine, [argument(X), argument(y, True)], launch.grid, launch.threadgroup, order, seed)
        return tuple(y.tolist())

    assert last(Order.UP, 0) == (7, 255)
    assert last(Order.DOWN, 0) == (0, 0)
    assert len({last(Order.SHUFFLED, seed) for seed in range(8)}) > 4


# ---- Text ----


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("float result = 0.0f;", "float result;", "uninitialized"),
        ("x[at]", "metal::max(x[at], 0)", "no matching function"),
        ("x[at]", "float(double(x[at]))", "double_is_no_metal_type"),
        ("const int at = int(", "const short at = int(", "implicit conversion"),
        ("x[at];", "x[at];\nconst threadgroup float* p = x;", "threadgroup|address_space"),
        ("x[at];", "x[at];\nthreadgroup float* p = (threadgroup float*)y;", "reinterpret_cast"),
        ("x[at];", "x[at];\nx[at] = 0.0f;", "read-only"),
        ("simd_sum(own)", "simd_summe(own)", "undeclared identifier 'simd_summe'"),
        ("simd_sum(own);", "simd_sum(own);\nfloat own = 0.0f;", "redefinition"),
        ("result += sums[g];", "int lane = 0;\nresult += sums[g + lane];", "shadows"),
    ],
)
def test_the_front_end_refuses_what_is_not_metal(old: str, new: str, message: str) -> None:
    body = planted(old, new)
    same = zip(body.splitlines(), SUM.splitlines(), strict=False)
    line = next(number for number, (changed, before) in enumerate(same, 1) if changed != before)
    with pytest.raises(NotMetalError, match=message) as refused:
        check(capture(source(body), sum_launch()))
    assert re.search(rf"planted.metal:({line}|{line + 1}):", str(refused.value))


def test_the_front_end_finds_no_error_in_mlx_s_kernels() -> None:
    utils = '#include "mlx/backend/metal/kernels/utils.h"\n'
    for file, function, arguments in [
        ("sdpa_vector.h", "sdpa_vector", "<half, 64, 64>"),
        ("gated_delta_update.h", "gated_delta_fused_chunk", "<float, 64, 32, 2, 4, 8>"),
    ]:
        text = utils + "#define MLX_MTL_PRAGMA_UNROLL\n" + (SHIPPED / file).read_text()
        assert "error:" not in messages(checkable(MetalText(text, function, arguments)))


def test_small_inputs_are_in_another_address_space() -> None:
    """MLX declares inputs of fewer than 8 elements as constant."""
    body = "const device float* p = x; y[0] = p[0];"
    check(capture(source(body), sum_launch()))
    with pytest.raises(NotMetalError, match=r"address.space"):
        check(capture(source(body), sum_launch(mx.ones((7,)))))


def test_text_that_is_no_program_says_why() -> None:
    with pytest.raises(CompileError, match="expected"):
        compiled(capture(source("y[0] = ;"), sum_launch()))


# ---- Memory ----

NEGATE = "const_cast<device {}*>(x)[thread_position_in_grid.x] = -x[thread_position_in_grid.x]; y[0] = 1.0f;"


def in_place(launcher: EmulatedLauncher, array: mx.array, kind: str) -> None:
    one = Launch((array,), (), (array.size, 1, 1), (1, 1, 1), (((1,), mx.float32),))
    body = NEGATE.format(kind).replace("y[0]", "if (thread_position_in_grid.x == 0) y[0]")
    launcher.launch(source(body, in_place=("x",)), one)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(mx.float32, "float"), (mx.float16, "half"), (mx.bfloat16, "bfloat"), (mx.int32, "int")]
)
def test_an_input_written_in_place_is_changed_for_everybody(
    dtype: mx.Dtype, kind: str, launcher: EmulatedLauncher
) -> None:
    array = mx.arange(24).reshape(2, 3, 4).astype(dtype)
    before = array + 0
    mx.eval(before)
    in_place(launcher, array, kind)
    assert mx.array_equal(array, -before).item()
    assert mx.array_equal(array[1] * 2, before[1] * -2).item()
    in_place(launcher, array, kind)
    assert mx.array_equal(array, before).item()


def test_an_input_that_mlx_would_copy_cannot_be_written_in_place(launcher: EmulatedLauncher) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\) and strides .* is not row-major"):
        in_place(launcher, mx.arange(8, dtype=mx.float32).reshape(2, 4).T, "float")


def test_other_inputs_may_be_strided(launcher: EmulatedLauncher) -> None:
    x = mx.array(X).reshape(64, 4).T.reshape(4, 64)
    transposed = mx.array(X).reshape(2, 128).T
    for given in (x, transposed):
        copy = source("y[thread_position_in_grid.x] = x[thread_position_in_grid.x];")
        (y,) = launcher.launch(copy, sum_launch(given))
        assert mx.array_equal(y, given.reshape(-1)).item()


@pytest.mark.parametrize(
    "change",
    [lambda text: text + " ", lambda text: text.replace("0.0f", "1.0f")],
    ids=["the same", "another"],
)
def test_a_changed_text_is_compiled_anew(change: Callable[[str], str], launcher: EmulatedLauncher) -> None:
    first, second = result(launcher, SUM), result(launcher, change(SUM))
    assert (first == second).all() == ("1.0f" not in change(SUM))


def test_every_line_of_a_message_is_the_file_s(launcher: EmulatedLauncher) -> None:
    body = planted(BARRIER, f"if (sg == 0) {{\n{BARRIER} }} else {{\n{BARRIER} }}\n")
    lines = [number for number, line in enumerate(body.splitlines(), 1) if "barrier" in line]
    with pytest.raises(KernelError, match=re.escape(f"lines {lines[0]} and {lines[1]}")):
        result(launcher, body)
