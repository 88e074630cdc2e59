"""How much MLX puts into one command buffer (Metal) or graph (CUDA) before it hands it to the GPU.

    platform --defaults--> MLX_MAX_OPS_PER_BUFFER, MLX_MAX_MB_PER_BUFFER --prepare--> os.environ, before MLX is imported

MLX reads them once, when it first touches the GPU; on the CPU it reads neither.

CUDA: measured on an H100 (docs/benchmarks.md, "kernels_gpu.py"), with MLX's cache of graphs enlarged as well: a graph
that holds a whole layer does for the next, and a decode step of Llama 3 8B's shape at 4,096 tokens took 8.4 ms instead
of 14.2 and 15.7; where MLX's own values do well (1,024 tokens) nothing changed.
Metal: EXPECTED, not measured. MLX's values are 40 or 50 of each (mlx/backend/metal/device.cpp), and the megabytes are
those of what operations read, weights included: one layer of a large model makes several command buffers. 100
operations are some four layers, behind which this worker starts evaluation anyway (LAYERS_PER_START in
attention/kernels.py), and 200 MB are a layer of an 8B model. More would hold more temporary arrays at once, for they
are freed when their buffer is done, and a long one may meet macOS' limit on a GPU's time.

Imports nothing but the standard library.
"""

import sys
from collections.abc import Mapping, MutableMapping

OPERATIONS, MEGABYTES = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"

METAL: Mapping[str, str] = {OPERATIONS: "100", MEGABYTES: "200"}
CUDA: Mapping[str, str] = {OPERATIONS: "100", MEGABYTES: "4000"}


def defaults(platform: str) -> Mapping[str, str]:
    """The values for `platform` (sys.platform)."""
    return METAL if platform == "darwin" else CUDA


def prepare(environ: MutableMapping[str, str], platform: str = sys.platform) -> None:
    """Set what the user has not set."""
    for name, value in defaults(platform).items():
        environ.setdefault(name, value)


def is_default(name: str, value: str, platform: str = sys.platform) -> bool:
    """Whether this is what `prepare` set here, and another machine sets for itself."""
    return defaults(platform).get(name) == value
