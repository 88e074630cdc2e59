"""What MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER are worth on this GPU: decode steps, and what a prompt holds.

    settings x rounds --a process each, for MLX reads them once--> ms of decode steps, ms and peak memory of a prompt

    python benchmarks/command_buffers.py [--layers 32] [--rounds 2] [--only defaults ours ...]

Llama 3 8B's shape with random bfloat16 weights (16 GB with all 32 layers), the worker's own path without sampling, as
in kernels_gpu.py. "ours" is what workers set (worker/command_buffers.py). Prints a Markdown table with
the least and the largest of the rounds, which take turns. Runs from a bare checkout with mlx, mlx-lm and numpy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import kernels_gpu

DECODE: Mapping[str, tuple[int, ...]] = {
    "1 x 1024": (1024,),
    "1 x 4096": (4096,),
    "8 x 1024": (1024,) * 8,
    "32 x 1024": (1024,) * 32,
}
PROMPT = 2048
"""Tokens of the prompt whose memory is looked at: a step of the default --max-num-batched-tokens."""
CACHE = "MLX_CUDA_GRAPH_CACHE_SIZE"


def settings() -> dict[str, dict[str, str]]:
    """Environment variables of each setting."""
    from pomarium.worker.command_buffers import DEFAULTS, MEGABYTES, OPERATIONS

    def of(operations: int, megabytes: int) -> dict[str, str]:
        return {OPERATIONS: str(operations), MEGABYTES: str(megabytes)}

    ours = dict(DEFAULTS)
    found = {"defaults": {}, "ours": ours}
    found |= {f"{o} and {m}": of(o, m) for o, m in ((50, 50), (100, 1000), (100, 4000), (200, 400), (400, 4000))}
    return found if sys.platform == "darwin" else found | {"ours, more graphs kept": ours | {CACHE: "4000"}}


def measure(layers: int) -> dict[str, float]:
    """In this process: ms of each step, and ms and GB of a prompt's."""
    kernels_gpu.prepare_imports()
    import mlx.core as mx

    from pomarium.kernels.launch import CudaLauncher, Launcher, MetalLauncher
    from pomarium.worker.models.paged import prepare

    launcher: Launcher = MetalLauncher() if mx.metal.is_available() else CudaLauncher()
    model = prepare(kernels_gpu.llama(layers), "llama")
    found = {f"{name}, ms": kernels_gpu.paged_step_ms(model, launcher, contexts) for name, contexts in DECODE.items()}
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found[f"prompt of {PROMPT}, ms"] = kernels_gpu.paged_prompt_ms(model, launcher, PROMPT)
    found["its peak above weights, MB"] = (mx.get_peak_memory() - before) / 1e6
    return found


def child(layers: int, variables: Mapping[str, str]) -> dict[str, float]:
    """`measure` in a process of its own. Raises CalledProcessError."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLX_MAX_") and name != CACHE}
    done = subprocess.run(
        [sys.executable, __file__, "--layers", str(layers), "--measure"],
        env={"MLX_PTX_CACHE_DIR": tempfile.gettempdir(), **kept, **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A row for each setting, least to largest of its rounds."""
    columns = list(next(iter(found.values()))[0])
    lines = [f"| setting | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for name, rounds in found.items():
        spans = [sorted(each[column] for each in rounds) for column in columns]
        cells = [f"{s[0]:.2f}" if len(s) == 1 else f"{s[0]:.2f} to {s[-1]:.2f}" for s in spans]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--rounds", type=int, default=2, help="of each setting")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="settings by name, such as defaults ours")
    parser.add_argument("--measure", action="store_true", help="measure with what the environment says, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.layers)))
        return 0
    kernels_gpu.prepare_imports()
    chosen = {name: values for name, values in settings().items() if name in (options.only or settings())}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, variables in chosen.items():
            found[name].append(child(options.layers, variables))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    text = table(found)
    print(text)
    if (out := os.environ.get("OUT")) is not None:
        (Path(out) / "command_buffers.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
