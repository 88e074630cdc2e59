"""All that a borrowed GPU is to tell in one run: are the kernels right, how fast are they, how does a step grow.

    --parts check      every case of kernels/cases against float64, outputs poisoned before (kernels/check.py)
            models     runner and kernels on random-weight models beside mlx-lm's forward (model_parity.py)
            attention  decode and prefill beside a device copy, MLX's and PyTorch's attention (paged_kernels.py)
            mla        MLA decode beside MLX operations (mla_decode.py)
            gdn        a gated-delta layer beside mlx-lm's (gated_delta_layer.py)
            step       decode steps of an 8B and a 0.6B shape, batch 1 to 64 and ragged, in the runner's loop, beside
                       mlx-lm's generator, its batch padded to the longest (decode_loop.py); 16 GB of weights
            serve      the runner's loop with requests that come and go
            hybrid     decode steps of a model with gated-delta layers, likewise
            latent     of one with latent attention
            sampling   the same loop with drawn, penalised and reported tokens, waited for and sent ahead

    python benchmarks/kernels_gpu.py [--parts check attention ...] [--layers 32]

Runs from a bare checkout with mlx, mlx-lm and numpy (PyTorch's figures where it is installed): nothing is installed,
no vLLM is needed, and of mlx-lm only its models. Prints Markdown; with the environment variable OUT also writes
kernels_gpu.md and kernels_gpu.json into that folder. A part that fails prints its traceback, the others go on, and the
exit code is 1. On CUDA, MLX runs with CUDA_GRAPHS, for its own figures, too; with --default-graphs it does not.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK_SIZE, CONTEXT = 16, 1024
BATCHES = (1, 2, 4, 8, 16, 32, 64)
RAGGED_LONGEST = 4096
CUDA_GRAPHS = {"MLX_MAX_OPS_PER_BUFFER": "100", "MLX_MAX_MB_PER_BUFFER": "4000", "MLX_CUDA_GRAPH_CACHE_SIZE": "4000"}
"""MLX's CUDA backend sends a graph after some operations, wherever that is in a layer, and makes one anew if it has
none alike. With these, the graph of a layer does for the next, too."""
ROUNDS = 30
SERVED_STEPS = 200


def prepare_imports() -> None:
    """Make this checkout importable as `pomarium`, and mlx-lm's models without its package, which wants transformers.

    Where the package is installed, or transformers is, nothing changes.
    """
    if importlib.util.find_spec("pomarium") is None:
        sys.path.insert(0, str(ROOT / "src"))
    lm = importlib.util.find_spec("mlx_lm")
    if lm is not None and importlib.util.find_spec("transformers") is None:
        models_only = ModuleType("mlx_lm")
        models_only.__path__ = list(lm.submodule_search_locations or [])
        sys.modules["mlx_lm"] = models_only
    sys.path.insert(0, str(ROOT / "benchmarks"))


class Tee(io.TextIOBase):
    """Writes to the terminal and keeps a copy."""

    def __init__(self) -> None:
        self._terminal, self._kept = sys.stdout, io.StringIO()

    def write(self, text: str) -> int:
        """See TextIOBase."""
        self._terminal.write(text)
        return self._kept.write(text)

    def flush(self) -> None:
        """See TextIOBase."""
        self._terminal.flush()

    @property
    def text(self) -> str:
        """All so far."""
        return self._kept.getvalue()


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in `text`, each a list of rows by column."""
    found: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if len(cells) < 2:
            header = []
        elif not header:
            header = cells
            found.append([])
        elif not all(set(cell) <= set("-: ") for cell in cells):
            found[-1].append(dict(zip(header, cells, strict=False)))
    return found


@contextlib.contextmanager
def arguments(*given: str) -> Iterator[None]:
    """Command-line arguments of another benchmark's main."""
    kept = sys.argv
    sys.argv = [kept[0], *given]
    try:
        yield
    finally:
        sys.argv = kept


def check_part(options: argparse.Namespace) -> None:
    """Print the report. Raises RuntimeError if a case is wrong."""
    from pomarium.kernels import check

    report = check.run(check.PoisonedLauncher(), options.seed)
    print(report.text)
    if report.failed:
        raise RuntimeError(f"{len(report.failed)} cases are wrong")


def models_part(options: argparse.Namespace) -> None:
    """See model_parity.py. Raises RuntimeError if a model is wrong."""
    import model_parity

    with arguments():
        if model_parity.main():
            raise RuntimeError("a model is wrong")


def attention_part(options: argparse.Namespace) -> None:
    """See paged_kernels.py."""
    import paged_kernels

    torch = importlib.util.find_spec("torch") is not None
    with arguments(*(["--torch"] if torch else [])):
        paged_kernels.main()


def mla_part(options: argparse.Namespace) -> None:
    """See mla_decode.py. Raises RuntimeError if a result is wrong."""
    import mla_decode

    with arguments("--repeats", "8"):
        if mla_decode.main():
            raise RuntimeError("a result is wrong")


def gdn_part(options: argparse.Namespace) -> None:
    """See gated_delta_layer.py."""
    import gated_delta_layer

    with arguments("--rounds", str(ROUNDS)):
        gated_delta_layer.main()


SHAPES: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "0.6B": {
        "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llama 3 8B's, and Qwen3 0.6B's without its norms of queries and keys; heads of 128."""


def llama(layers: int, name: str = "8B") -> Any:
    """A shape with at most `layers` layers, random bfloat16 weights."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    shape = SHAPES[name] | {"num_hidden_layers": min(layers, SHAPES[name]["num_hidden_layers"])}
    module = Model(ModelArgs(model_type="llama", rms_norm_eps=1e-5, rope_theta=500000.0, head_dim=128, **shape))
    module.update(tree_map(lambda w: (mx.random.normal(w.shape) * 0.02).astype(mx.bfloat16), module.parameters()))
    mx.eval(module.parameters())
    return module


def median_ms(step: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Of `rounds` behind three that are not counted; `step` evaluates by itself."""
    taken = []
    for number in range(rounds + 3):
        began = time.perf_counter()
        step()
        if number >= 3:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3


def paged_step_ms(model: Any, launcher: Any, contexts: Sequence[int]) -> float:
    """One decode step of sequences that have so many tokens, their new one included."""
    import mlx.core as mx
    import numpy as np
    from decode_loop import fill

    from pomarium.kernels.gpu_family import this_gpu
    from pomarium.worker.attention.kernels import KernelAttention
    from pomarium.worker.batch import Batch
    from pomarium.worker.batch import Sequence as Rows
    from pomarium.worker.forward import PagedForward
    from pomarium.worker.kv_cache.layout import single_group_layout
    from pomarium.worker.kv_cache.pool import PagedPool

    needed = [-(-context // BLOCK_SIZE) for context in contexts]
    blocks = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
    held = np.split(blocks, np.cumsum(needed)[:-1])
    pool = PagedPool(single_group_layout(model.layers, BLOCK_SIZE, sum(needed)), model.dtype)
    fill(pool, sum(needed) * BLOCK_SIZE)
    forward = PagedForward(model, KernelAttention(pool, launcher, this_gpu()))
    sequences = tuple(
        Rows(str(number), context - 1, 1, (tuple(table.tolist()),))
        for number, (context, table) in enumerate(zip(contexts, held, strict=True))
    )
    rows = np.arange(len(contexts), dtype=np.int32)
    positions = np.array(contexts, np.int32) - 1
    batch = Batch(sequences, rows, positions, rows, rows, tuple(map(str, rows)), {})
    token_ids = mx.array(batch.token_ids)
    return median_ms(lambda: forward.run(batch, token_ids))


def paged_prompt_ms(model: Any, launcher: Any, tokens: int) -> float:
    """One step that computes a whole prompt and wants its last logits."""
    import mlx.core as mx
    import numpy as np

    from pomarium.kernels.gpu_family import this_gpu
    from pomarium.worker.attention.kernels import KernelAttention, paged_pool
    from pomarium.worker.batch import Batch
    from pomarium.worker.batch import Sequence as Rows
    from pomarium.worker.forward import PagedForward
    from pomarium.worker.kv_cache.layout import single_group_layout

    blocks = -(-tokens // BLOCK_SIZE)
    pool = paged_pool(single_group_layout(model.layers, BLOCK_SIZE, blocks), model.dtype, launcher)
    forward = PagedForward(model, KernelAttention(pool, launcher, this_gpu()))
    rows, last = np.arange(tokens, dtype=np.int32), np.array([tokens - 1], np.int32)
    sequence = Rows("0", 0, tokens, (tuple(range(blocks)),))
    batch = Batch((sequence,), rows, rows, last, np.zeros(1, np.int32), ("0",), {})
    token_ids = mx.array(batch.token_ids)
    return median_ms(lambda: forward.run(batch, token_ids), 10)


def step_part(options: argparse.Namespace) -> None:
    """Print decode steps of our path and of mlx-lm."""
    import decode_loop
    import mlx.core as mx
    import numpy as np
    from decode_loop import Way

    from pomarium.worker.models.paged import prepare

    ragged = [int(n) for n in np.random.default_rng(0).integers(1, RAGGED_LONGEST + 1, 32)]
    mixes = {f"{count} x {CONTEXT}": [CONTEXT] * count for count in BATCHES}
    mixes |= {f"32 ragged, 1 to {RAGGED_LONGEST}": ragged, f"1 x {RAGGED_LONGEST}": [RAGGED_LONGEST]}
    print("Milliseconds per decode step, bf16, greedy sampling included.\n")
    print("| shape, sequences x context | mlx-lm, each waited for | mlx-lm, sent ahead | ours built, waited for | "
          "ours as a graph, waited for | ours as a graph, sent ahead | times mlx-lm sent ahead |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|")
    launcher = gpu_launcher()
    for shape in SHAPES:
        module = llama(options.layers, shape)
        # What `prepare` changes leaves mlx-lm's own way as it is, with caches of its own (models.rows).
        model = prepare(module, "llama")
        for name, contexts in mixes.items():
            sides = [
                decode_loop.theirs(module, decode_loop.their_caches(module, contexts, 8), len(contexts), ahead=ahead)
                for ahead in (False, True)
            ]
            ways = (Way(False, False), Way(True, False), Way(True, True))
            sides += [decode_loop.steady(model, launcher, way, contexts) for way in ways]
            found = decode_loop.in_turns(sides)
            cells = " | ".join(f"{ms:.2f}" for ms in found)
            print(f"| {shape}, {name} | {cells} | {found[1] / found[-1]:.2f} |", flush=True)
        del module, model
        mx.clear_cache()


def serve_part(options: argparse.Namespace) -> None:
    """Print what a step takes while requests come and go."""
    import decode_loop
    from decode_loop import Way

    from pomarium.worker.models.paged import prepare

    print(
        f"{SERVED_STEPS} steps of the 8B shape, one request ending and one with a short prompt coming each 8 steps.\n"
    )
    print("| requests | built, waited for, ms per step | as graphs, sent ahead | | graphs traced on the way |")
    print("|---:|---:|---:|---:|---:|")
    model = prepare(llama(options.layers), "llama")
    for count in (1, 8, 32):
        built, _ = decode_loop.coming_and_going(model, gpu_launcher(), Way(False, False), count, SERVED_STEPS)
        ahead, traced = decode_loop.coming_and_going(model, gpu_launcher(), Way(True, True), count, SERVED_STEPS)
        print(f"| {count} | {built:.2f} | {ahead:.2f} | {built / ahead:.2f}x | {traced} |", flush=True)


def sampling_part(options: argparse.Namespace) -> None:
    """Print what steps take whose tokens are drawn, penalised and told with log-probabilities."""
    import decode_loop
    import mlx.core as mx
    from decode_loop import Way

    from pomarium.worker.models.paged import prepare
    from pomarium.worker.sampling_params import SamplingParams

    drawn = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
    kinds = {
        "greedy": decode_loop.GREEDY,
        "drawn": drawn,
        "drawn, repetition penalty": replace(drawn, repetition_penalty=1.05),
        "the same, 5 log-probabilities": replace(drawn, repetition_penalty=1.05, num_logprobs=5),
    }
    print("Milliseconds per decode step of the 8B shape, as a graph; drawn: temperature 0.7, top_p 0.8, top_k 20.\n")
    print("| sampling, sequences x context | waited for | sent ahead | |")
    print("|---|---:|---:|---:|")
    model = prepare(llama(options.layers), "llama")
    for count in (1, 8, 32):
        for name, sampling in kinds.items():
            ways = (Way(True, False), Way(True, True))
            contexts = [CONTEXT] * count
            steps = [decode_loop.steady(model, gpu_launcher(), way, contexts, sampling) for way in ways]
            waited, ahead = decode_loop.in_turns(steps)
            del steps
            mx.clear_cache()
            row = f"| {name}, {count} x {CONTEXT} | {waited:.2f} | {ahead:.2f} | {waited / ahead:.2f}x |"
            print(row, flush=True)


def hybrid(layers: int) -> Any:
    """Qwen3-Next with Qwen3.5 4B's sizes, dense: three of four layers are gated-delta ones. Random bfloat16 weights."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.qwen3_next import Model, ModelArgs

    shape = {
        "model_type": "qwen3_next", "hidden_size": 2560, "num_hidden_layers": layers, "intermediate_size": 9216,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_theta": 1e7, "partial_rotary_factor": 0.25, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "shared_expert_intermediate_size": 0,
        "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": list(range(layers)),
    }  # fmt: skip
    module = Model(ModelArgs.from_dict(shape))
    module.update(tree_map(lambda w: (mx.random.normal(w.shape) * 0.02).astype(mx.bfloat16), module.parameters()))
    mx.eval(module.parameters())
    return module


def latent(layers: int) -> Any:
    """DeepSeek-V3's definition with DeepSeek-V2-Lite's sizes, dense. Random bfloat16 weights."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs

    shape = {
        "model_type": "deepseek_v3", "hidden_size": 2048, "num_hidden_layers": layers, "intermediate_size": 10944,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 102400,
        "first_k_dense_replace": layers, "max_position_embeddings": 32768,
    }  # fmt: skip
    module = Model(ModelArgs.from_dict(shape))
    module.update(tree_map(lambda w: (mx.random.normal(w.shape) * 0.02).astype(mx.bfloat16), module.parameters()))
    mx.eval(module.parameters())
    return module


def hybrid_part(options: argparse.Namespace) -> None:
    """Print decode steps of a hybrid model, ours and mlx-lm's."""
    _families("a hybrid model", hybrid, "qwen3_next", options.layers)


def latent_part(options: argparse.Namespace) -> None:
    """Print decode steps of a model with latent attention, ours and mlx-lm's."""
    _families("a model with latent attention", latent, "deepseek_v3", min(27, options.layers))


def _families(named: str, build: Callable[[int], Any], model_type: str, layers: int) -> None:
    import decode_loop
    import mlx.core as mx
    from decode_loop import Way

    from pomarium.worker.models.paged import prepare

    print(f"Milliseconds per decode step of {named} of {layers} layers, bf16, greedy.\n")
    print("| sequences x context | mlx-lm, sent ahead | ours built, waited for | ours as a graph, waited for | "
          "ours as a graph, sent ahead | times mlx-lm sent ahead |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|")
    module = build(layers)
    model, launcher = prepare(module, model_type), gpu_launcher()
    for count in (1, 2, 8, 32):
        caches = decode_loop.their_filled_caches(module, count, CONTEXT)
        sides = [decode_loop.theirs(module, caches, count, ahead=True)]
        ways = (Way(False, False), Way(True, False), Way(True, True))
        sides += [decode_loop.steady(model, launcher, way, [CONTEXT] * count) for way in ways]
        found = decode_loop.in_turns(sides)
        cells = " | ".join(f"{ms:.2f}" for ms in found)
        print(f"| {count} x {CONTEXT} | {cells} | {found[0] / found[-1]:.2f} |", flush=True)
        del sides, caches
        mx.clear_cache()


def gpu_launcher() -> Any:
    """Of this machine's GPU."""
    import mlx.core as mx

    from pomarium.kernels.launch import CudaLauncher, MetalLauncher

    return MetalLauncher() if mx.metal.is_available() else CudaLauncher()


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check_part,
    "models": models_part,
    "attention": attention_part,
    "step": step_part,
    "serve": serve_part,
    "sampling": sampling_part,
    "hybrid": hybrid_part,
    "latent": latent_part,
    "mla": mla_part,
    "gdn": gdn_part,
}


def run_part(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Run a part; what it printed, its tables and whether it failed."""
    tee, failure = Tee(), None
    began = time.perf_counter()
    with contextlib.redirect_stdout(tee):
        print(f"\n## {name}\n", flush=True)
        try:
            PARTS[name](options)
        except Exception:  # noqa: BLE001 - the other parts' figures are wanted whatever happens
            failure = traceback.format_exc()
            print(f"\n```\n{failure}```")
        print(f"\n({name}: {time.perf_counter() - began:.0f} s)", flush=True)
    return {"part": name, "text": tee.text, "tables": tables(tee.text), "failure": failure}


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=32, help="of the model whose steps are timed")
    parser.add_argument("--default-graphs", action="store_true", help="leave MLX's CUDA graphs as they are")
    parser.add_argument("--seed", type=int, default=0, help="of the checks' random inputs")
    options = parser.parse_args()
    # Never machine code of another text under the same name.
    os.environ.setdefault("MLX_PTX_CACHE_DIR", tempfile.mkdtemp())
    if not options.default_graphs:
        os.environ.update(CUDA_GRAPHS)
    prepare_imports()
    import mlx.core as mx

    heading = f"# {mx.device_info(mx.default_device()).get('device_name')}, MLX {mx.__version__}\n"
    print(heading, flush=True)
    done: list[dict[str, object]] = []
    for name in options.parts:
        done.append(run_part(name, options))
        if (out := os.environ.get("OUT")) is not None:
            text = heading + "".join(str(part["text"]) for part in done)
            (Path(out) / "kernels_gpu.md").write_text(text, encoding="utf-8")
            (Path(out) / "kernels_gpu.json").write_text(json.dumps(done, indent=1), encoding="utf-8")
    return int(any(part["failure"] is not None for part in done))


if __name__ == "__main__":
    sys.exit(main())
