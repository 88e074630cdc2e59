"""How much MLX puts into one command buffer (Metal) or graph (CUDA) before it hands it to the GPU.

    MLX_MAX_OPS_PER_BUFFER, MLX_MAX_MB_PER_BUFFER --prepare--> os.environ, before MLX is imported

MLX reads them once, when it first touches the GPU; on the CPU it reads neither.

CUDA: an H200 tells settings apart by memory alone (docs/benchmarks.md, "Command buffers"): the host bounds its steps,
and a prompt's step of 2,048 tokens holds 1.1 GB above the weights with 50 MB, 3.0 with 200, 4.7 with more. With 200 no
decode step was slower than with MLX's own values in both rounds.
Metal: EXPECTED, not measured. MLX's values are 40 or 50 of each (mlx/backend/metal/device.cpp), and the megabytes are
those of what operations read, weights included: one layer of a large model makes several command buffers. 100
operations are some four layers, behind which this worker starts evaluation anyway (LAYERS_PER_START in
attention/kernels.py), and 200 MB are a layer of an 8B model. More would hold more temporary arrays at once, for they
are freed when their buffer is done, and a long one may meet macOS' limit on a GPU's time.

Imports nothing but the standard library.
"""

from collections.abc import Mapping, MutableMapping

OPERATIONS, MEGABYTES = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
DEFAULTS: Mapping[str, str] = {OPERATIONS: "100", MEGABYTES: "200"}


def prepare(environ: MutableMapping[str, str]) -> None:
    """Set what the user has not set."""
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)


def is_default(name: str, value: str) -> bool:
    """Whether this is what `prepare` sets, as every machine does for itself."""
    return DEFAULTS.get(name) == value
