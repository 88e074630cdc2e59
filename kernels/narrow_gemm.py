"""C = A B' of few rows on a CPU, without packing B: what a decode step of a transformer spends its time on.

    source(lanes) --LLVM, for this machine's processor--> Product.address, a function with cblas_sgemm's own signature
        narrow (below)  --> tiles of 4 x 3 dot products, each a vector that runs along K, summed at its end
        anything else   --> jumps to `fallback` with the same arguments

A BLAS copies ("packs") all of B before it multiplies, which pays when many rows of A use the copy. A decode step has a
row per sequence and B is a weight: read once from memory it costs what the memory takes. Each tile asks the cache for
the next tile's rows of B while it computes. SmolLM2's products on one core of an AMD EPYC with OpenBLAS as fallback:
1 row 2.1 to 2.8 times as fast, 8 rows 1.5 to 2.3 times (benchmarks/products.py).

A row of the result has the same bits whichever rows are computed with it.

Source: LLVM language reference 20 (intrinsics llvm.fma, llvm.vector.reduce.fadd, llvm.prefetch); the C interface of the
BLAS (`cblas_sgemm`, 101 row-major, 111 not transposed, 112 transposed).
"""

import platform
from dataclasses import dataclass

import llvmlite.binding as llvm

MAX_ELEMENTS = 1 << 15
"""Elements of A in a narrow product: they are read once per tile and should stay close, in 128 KiB of second-level
cache. At 32 rows of 1,536 packing won by a fifth, at 32 rows of 576 it lost by as much."""

ROWS, COLUMNS = 4, 3
"""Of a tile: 12 sums, 3 vectors of B and one of A are the 16 vector registers of AVX2."""

ENTRY = "narrow_sgemm"

_ARGUMENTS = (
    "i32 %order, i32 %ta, i32 %tb, i32 %m, i32 %n, i32 %k, float %alpha, ptr %a, i32 %lda, ptr %b, i32 %ldb, "
    "float %beta, ptr %c, i32 %ldc"
)


@dataclass(frozen=True)
class Product:
    """A compiled product.

    Attributes:
        address: of the function; valid as long as this object lives. lanes: floats in a vector.
    """

    address: int
    lanes: int
    engine: llvm.ExecutionEngine


def lanes() -> int | None:
    """Floats in a vector register of this machine; None where there is no fused multiply-add, which narrow products
    are made of."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("fma") or platform.machine() in ("arm64", "aarch64") else None


def compile_product(fallback: int, lanes: int) -> Product:
    """Machine code for this processor.

    Args:
        fallback: address of the `cblas_sgemm` that takes what is not narrow.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(source(fallback, lanes))
    module.verify()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=3)
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return Product(engine.get_function_address(ENTRY), lanes, engine)


def source(fallback: int, lanes: int) -> str:
    """The module in LLVM's assembly language."""
    vector = f"<{lanes} x float>"
    declarations = (
        f"declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})\n"
        f"declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, {vector})\n"
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"
    )
    tiles = [_tile(rows, columns, lanes) for rows in (ROWS, 1) for columns in (COLUMNS, 1)]
    return "\n".join([declarations, *tiles, _column_block(COLUMNS), _column_block(1), _entry(fallback, lanes)])


def _entry(fallback: int, lanes: int) -> str:
    """cblas_sgemm's signature: narrow or not, then all of C by blocks of columns."""
    conditions = [
        ("i32 %order, 101", "eq"),
        ("i32 %ta, 111", "eq"),
        ("i32 %tb, 112", "eq"),
        ("i64 %area, " + str(MAX_ELEMENTS), "ule"),
        (f"i32 %k, {lanes}", "sge"),
        ("i32 %rest, 0", "eq"),
    ]
    tests = ["  %is0 = fcmp oeq float %alpha, 1.0\n  %was0 = fcmp oeq float %beta, 0.0\n  %all0 = and i1 %is0, %was0"]
    for index, (operands, predicate) in enumerate(conditions, 1):
        tests.append(f"  %is{index} = icmp {predicate} {operands}")
        tests.append(f"  %all{index} = and i1 %all{index - 1}, %is{index}")
    widened = "\n".join(f"  %{name.upper()} = sext i32 %{name} to i64" for name in ("m", "n", "k", "lda", "ldb", "ldc"))
    return f"""
define void @{ENTRY}({_ARGUMENTS}) {{
entry:
{widened}
  %area = mul i64 %M, %K
  %rest = and i32 %k, {lanes - 1}
{chr(10).join(tests)}
  br i1 %all{len(conditions)}, label %blocks, label %other
other:
  %elsewhere = inttoptr i64 {fallback} to ptr
  tail call void %elsewhere({_ARGUMENTS})
  ret void
blocks:
{_loop("block", "%N", COLUMNS, "blocks", "singles", _call_columns(COLUMNS, "block"))}
singles:
{_loop("single", "%N", 1, "singles", "end", _call_columns(1, "single"), first="%block")}
end:
  ret void
}}"""


def _call_columns(columns: int, at: str) -> str:
    return f"""
  %b_off_{at} = mul i64 %{at}, %LDB
  %b_{at} = getelementptr float, ptr %b, i64 %b_off_{at}
  %c_{at} = getelementptr float, ptr %c, i64 %{at}
  call void @columns{columns}(i64 %M, i64 %K, ptr %a, i64 %LDA, ptr %b_{at}, i64 %LDB, ptr %c_{at}, i64 %LDC)"""


def _column_block(columns: int) -> str:
    """All rows of `columns` columns of C: tiles of ROWS rows, then of one."""

    def call(rows: int, at: str) -> str:
        return f"""
  %a_off_{at} = mul i64 %{at}, %lda
  %a_{at} = getelementptr float, ptr %a, i64 %a_off_{at}
  %c_off_{at} = mul i64 %{at}, %ldc
  %c_{at} = getelementptr float, ptr %c, i64 %c_off_{at}
  call void @tile{rows}x{columns}(i64 %k, ptr %a_{at}, i64 %lda, ptr %b, i64 %ldb, ptr %c_{at}, i64 %ldc)"""

    return f"""
define internal void @columns{columns}(i64 %m, i64 %k, ptr %a, i64 %lda, ptr %b, i64 %ldb, ptr %c, i64 %ldc) {{
entry:
  br label %tiles
tiles:
{_loop("tile", "%m", ROWS, "tiles", "rows", call(ROWS, "tile"))}
rows:
{_loop("row", "%m", 1, "rows", "end", call(1, "row"), first="%tile")}
end:
  ret void
}}"""


def _loop(at: str, end: str, step: int, label: str, after: str, body: str, first: str = "0") -> str:
    """Runs `body` with %at = first, first + step, ... while a whole step fits before `end`; then goes to `after`."""
    return f"""  br label %{label}_head
{label}_head:
  %{at} = phi i64 [{first}, %{label}], [%{at}_next, %{label}_body]
  %{at}_next = add i64 %{at}, {step}
  %{at}_fits = icmp sle i64 %{at}_next, {end}
  br i1 %{at}_fits, label %{label}_body, label %{after}
{label}_body:{body}
  br label %{label}_head"""


def _tile(rows: int, columns: int, lanes: int) -> str:
    """rows x columns elements of C. The rows of B that are prefetched are the next tile's; past the end of B that is
    harmless, for a prefetch never faults."""
    vector, cells = f"<{lanes} x float>", [(i, j) for i in range(rows) for j in range(columns)]
    lines = [
        f"define internal void @tile{rows}x{columns}(i64 %k, ptr %a, i64 %lda, ptr %b, i64 %ldb, ptr %c, i64 %ldc) {{",
        "entry:",
        f"  %ahead = mul i64 %ldb, {columns}",
        *(_row_pointer("a", "lda", i) for i in range(rows)),
        *(_row_pointer("b", "ldb", j) for j in range(columns)),
        *(_row_pointer("c", "ldc", i) for i in range(rows)),
        "  br label %along\nalong:",
        "  %p = phi i64 [0, %entry], [%next, %along]",
        *(f"  %old{i}_{j} = phi {vector} [zeroinitializer, %entry], [%sum{i}_{j}, %along]" for i, j in cells),
    ]
    for name, count in (("a", rows), ("b", columns)):
        for i in range(count):
            lines.append(f"  %at_{name}{i} = getelementptr float, ptr %{name}{i}, i64 %p")
            lines.append(f"  %v_{name}{i} = load {vector}, ptr %at_{name}{i}, align 4")
    for j in range(columns):
        lines.append(f"  %soon{j} = getelementptr float, ptr %at_b{j}, i64 %ahead")
        lines.append(f"  call void @llvm.prefetch.p0(ptr %soon{j}, i32 0, i32 3, i32 1)")
    for i, j in cells:
        operands = f"{vector} %v_a{i}, {vector} %v_b{j}, {vector} %old{i}_{j}"
        lines.append(f"  %sum{i}_{j} = call {vector} @llvm.fma.v{lanes}f32({operands})")
    lines += [
        f"  %next = add i64 %p, {lanes}",
        "  %more = icmp slt i64 %next, %k",
        "  br i1 %more, label %along, label %done\ndone:",
    ]
    for i, j in cells:
        reduce = f"@llvm.vector.reduce.fadd.v{lanes}f32(float 0.0, {vector} %sum{i}_{j})"
        lines.append(f"  %total{i}_{j} = call reassoc float {reduce}")
        lines.append(f"  %to{i}_{j} = getelementptr float, ptr %c{i}, i64 {j}")
        lines.append(f"  store float %total{i}_{j}, ptr %to{i}_{j}, align 4")
    return "\n".join([*lines, "  ret void\n}"])


def _row_pointer(name: str, stride: str, row: int) -> str:
    """%name<row>, the start of that row."""
    offset = f"  %{name}_off{row} = mul i64 %{stride}, {row}"
    return f"{offset}\n  %{name}{row} = getelementptr float, ptr %{name}, i64 %{name}_off{row}"
