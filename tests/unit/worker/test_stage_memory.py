"""A stage reads and holds its own layers only: measured in processes of their own, on checkpoints of 384 MiB and more.

The files are sparse, so they take no room on disk; reading them costs the memory that reading full ones would.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory in /proc")

MIB = 1 << 20
CONSTANT = 48 * MIB
"""What loading may take beyond the stage's own parameters: the largest of them as stored, and MLX's lazy graphs."""

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 1024, 4096, 8, 32768

LOAD_AND_MEASURE = """
import json, os, sys, time
from pathlib import Path
import mlx.core as mx
from pomarium.worker.models.load import load
from pomarium.worker.models.stages import StageCut

def of(file, key):
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(key)).split()[1])

def open_files(directory):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [target for link in links if os.path.lexists(link) and (target := os.readlink(link)).startswith(directory)]

without_weights = of("/proc/self/status", "VmRSS:")
for directory, first, end, layers, dense in json.loads(sys.argv[1]):
    mx.clear_cache()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    read = of("/proc/self/io", "rchar:")
    loaded = load(Path(directory), dense=dense, dtype=mx.float32, cut=StageCut(first, end, layers))
    mx.synchronize()
    peak, read = 1024 * (of("/proc/self/status", "VmHWM:") - without_weights), of("/proc/self/io", "rchar:") - read
    held = mx.get_active_memory()
    deadline = time.monotonic() + 5  # MLX's reading threads close a file a moment after its last array is there
    while (still_open := open_files(directory)) and time.monotonic() < deadline:
        time.sleep(0.01)
    print(json.dumps([peak, held, read, loaded.weight_bytes, still_open]))
    del loaded
"""


@dataclass(frozen=True)
class Measured:
    """Bytes: `peak` of resident memory above the process before loading, `held` by MLX, `read` from files."""

    peak: int
    held: int
    read: int
    weight_bytes: int
    open: list[str]


def projections() -> dict[str, tuple[int, int]]:
    """Matrices of one layer: name -> (rows, columns)."""
    attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    wide = {f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    return attention | wide | {"mlp.down_proj": (HIDDEN, INTERMEDIATE)}


def tensors(bits: int, tied: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of a llama of bfloat16 weights, or of 4-bit ones in groups of 64."""
    matrices = {"model.embed_tokens": (VOCAB, HIDDEN)} | ({} if tied else {"lm_head": (VOCAB, HIDDEN)})
    norms = ["model.norm"]
    for layer in range(LAYERS):
        matrices |= {f"model.layers.{layer}.{name}": shape for name, shape in projections().items()}
        norms += [f"model.layers.{layer}.{name}_layernorm" for name in ("input", "post_attention")]
    found: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.weight": ("BF16", (HIDDEN,)) for name in norms}
    for name, (rows, columns) in matrices.items():
        if bits == 16:
            found[f"{name}.weight"] = ("BF16", (rows, columns))
        else:
            found[f"{name}.weight"] = ("U32", (rows, columns * bits // 32))
            found |= {f"{name}.{part}": ("BF16", (rows, columns // 64)) for part in ("scales", "biases")}
    return found


def write_sparse(directory: Path, bits: int, tied: bool) -> Path:
    """A checkpoint of zeros that takes a few KiB on disk."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors(bits, tied).items():
        nbytes = math.prod(shape) * (4 if dtype == "U32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps({"__metadata__": {"format": "mlx"}} | header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "tie_word_embeddings": tied,
    }  # fmt: skip
    quantisation = {} if bits == 16 else {"quantization": {"group_size": 64, "bits": bits}}
    (directory / "config.json").write_text(json.dumps(config | quantisation))
    return directory


def bytes_of(bits: float, layers: int, embeddings: int) -> int:
    weights = layers * sum(map(math.prod, projections().values())) + embeddings * VOCAB * HIDDEN
    return int(weights * bits) // 8


@dataclass(frozen=True)
class Case:
    """A stage [first, end) of a checkpoint; `stored_bits` and `loaded_bits` per weight, scales and biases counted."""

    bits: int
    tied: bool
    first: int
    end: int
    dense: bool
    stored_bits: float
    loaded_bits: float
    embeddings: int


CASES = {
    "first, 4 bits kept, untied": Case(4, False, 0, 2, False, 4.5, 5, 1),
    "last, 4 bits kept, tied head": Case(4, True, 5, 8, False, 4.5, 5, 1),
    "middle, bfloat16 to float32": Case(16, False, 3, 5, True, 16, 32, 0),
    "middle, 4 bits to dense float32": Case(4, False, 3, 5, True, 4.5, 32, 0),
}
"""From small to large: a process may keep for itself what it freed, up to the size of an earlier case."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """All cases, one after another in one process that does nothing else."""
    jobs = []
    for index, case in enumerate(CASES.values()):
        directory = write_sparse(tmp_path_factory.mktemp(f"checkpoint{index}"), case.bits, case.tied)
        jobs.append((str(directory), case.first, case.end, LAYERS, case.dense))
    command = [sys.executable, "-c", LOAD_AND_MEASURE, json.dumps(jobs)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    results = (Measured(*json.loads(line)) for line in run.stdout.splitlines())
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_stage_takes_its_own_weights_and_a_constant(name: str, measured: dict[str, Measured]) -> None:
    case, got = CASES[name], measured[name]
    own = bytes_of(case.loaded_bits, case.end - case.first, case.embeddings)
    stored = bytes_of(case.stored_bits, case.end - case.first, case.embeddings)
    print(f"own {own / MIB:.0f} MiB, stored {stored / MIB:.0f}, peak {got.peak / MIB:.0f}, read {got.read / MIB:.0f}")
    assert own <= got.weight_bytes <= own + MIB
    assert own <= got.held <= own + MIB
    assert stored <= got.read <= stored + MIB
    # The process may have had free memory of its own to put weights into, so the lower bound is a loose one.
    assert own // 2 <= got.peak <= own + CONSTANT
    assert got.open == []
