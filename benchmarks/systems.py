"""The systems under test behind measure's interface, and what is fixed and recorded for each.

    Spec (name, peer, environment, chunk) --open_system, in a child process--> Offline or Streaming

A child process runs one system. mlx-lm's processes call `pomarium.worker.blas.load`, so that MLX multiplies with the
same BLAS everywhere; `mlx-lm bundled` is mlx-lm as installed. Thread counts come from the environment.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import probe
from measure import Offline, Streaming
from prompts import Prompt

MAX_MODEL_LEN = 4096
MAX_STREAMS = 32
KV_BYTES = 512 << 20
"""KV pool of vLLM's engines; mlx-lm's caches grow with their contents."""
CHUNK = 2048
"""Prompt tokens in a step where throughput is measured: mlx-lm's own default."""
GAP_CHUNK = 256
"""Tokens in a step of vLLM's engines where gaps are measured: what an interactive endpoint would set."""


@dataclass(frozen=True)
class Spec:
    """One row of the tables.

    Attributes:
        kind: "vllm", "mlx-batch" or "mlx-server". executor: vLLM's distributed_executor_backend.
        chunk, gap_chunk: prompt tokens in a step, offline and where gaps are measured.
        streams: of `throughput`. parts: what it can answer.
        bundled_blas: MLX multiplies with what it was installed with. narrow: with kernels.narrow_gemm, as our worker.
    """

    name: str
    label: str
    kind: str
    executor: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    chunk: int = CHUNK
    gap_chunk: int = GAP_CHUNK
    streams: tuple[int, ...] = (1, 8, 32)
    parts: tuple[str, ...] = ("throughput", "first-token", "gap", "memory")
    bundled_blas: bool = False
    narrow: bool = False


_CPU_BACKEND = {"VLLM_METAL_USE_MLX": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

SPECS = (
    Spec("ours", "Pomarium", "vllm"),
    Spec("mlx-batch", "mlx-lm `batch_generate`", "mlx-batch", parts=("throughput", "first-token", "memory")),
    Spec("mlx-server", "mlx-lm server", "mlx-server", gap_chunk=CHUNK),
    Spec("vllm-cpu", "vLLM CPU backend", "vllm", executor="mp", environment=_CPU_BACKEND),
    Spec("ours-ray", "Pomarium, worker in a Ray actor", "vllm", executor="ray"),
    Spec(
        "mlx-narrow",
        "mlx-lm `batch_generate`, our product of few rows",
        "mlx-batch",
        parts=("throughput",),
        narrow=True,
    ),
    Spec("mlx-server-256", "mlx-lm server, step 256", "mlx-server", chunk=256, parts=("gap",)),
    Spec(
        "mlx-bundled",
        "mlx-lm `batch_generate`, its own BLAS",
        "mlx-batch",
        streams=(1, 8),
        parts=("throughput",),
        bundled_blas=True,
    ),
)


def spec_of(name: str) -> Spec:
    """The spec called `name`. Raises KeyError."""
    return {spec.name: spec for spec in SPECS}[name]


@contextlib.contextmanager
def open_offline(spec: Spec, model: Path) -> Iterator[Offline]:
    """Load the system; it is gone when the block ends."""
    if spec.kind == "vllm":
        from vllm import LLM

        yield VllmOffline(LLM(**_engine_arguments(spec, model, spec.chunk)))
    elif spec.kind == "mlx-batch":
        yield MlxBatch(spec, model)
    else:
        with _mlx_server(spec, model) as server:
            yield server


@contextlib.contextmanager
def open_streaming(spec: Spec, model: Path) -> Iterator[Streaming]:
    """As `open_offline`, for streams. Call it, and use it, on one running event loop."""
    if spec.kind == "vllm":
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**_engine_arguments(spec, model, spec.gap_chunk))
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            yield VllmStreaming(engine)
        finally:
            engine.shutdown()
    else:
        with _mlx_server(spec, model) as server:
            yield server


def _engine_arguments(spec: Spec, model: Path, chunk: int) -> dict[str, Any]:
    worker = "ProbedCPUWorker" if spec.environment else "ProbedMetalWorker"
    return {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_STREAMS,
        "max_num_batched_tokens": chunk,
        "kv_cache_memory_bytes": KV_BYTES,
        "distributed_executor_backend": spec.executor,
        "worker_cls": f"probe.{worker}",
        "disable_log_stats": True,
        "enforce_eager": True,  # compiling takes minutes on two cores; our platform has nothing to compile
    }


class VllmOffline:
    """vllm.LLM, on whichever platform the environment chose."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def complete(self, prompts: Sequence[Prompt], tokens: int) -> int:
        """See measure.Offline."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        outputs = self._engine.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


class VllmStreaming:
    """vLLM's AsyncLLM, which its servers are built on."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._ids = itertools.count()

    async def stream(self, prompt: Prompt, tokens: int) -> AsyncIterator[None]:
        """See measure.Streaming."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        inputs = {"prompt_token_ids": list(prompt.token_ids)}
        async for output in self._engine.generate(inputs, params, f"r{next(self._ids)}"):
            for _ in output.outputs[0].token_ids:
                yield None


class MlxBatch:
    """mlx-lm's `batch_generate` in this process."""

    def __init__(self, spec: Spec, model: Path) -> None:
        from mlx_lm import load

        bind_blas(spec)
        probe.note()
        self._chunk = spec.chunk
        self._model, self._tokenizer = load(str(model))

    def complete(self, prompts: Sequence[Prompt], tokens: int) -> int:
        """See measure.Offline."""
        from mlx_lm.generate import batch_generate

        response = batch_generate(
            self._model,
            self._tokenizer,
            [list(prompt.token_ids) for prompt in prompts],
            max_tokens=tokens,
            return_token_ids=True,
            prefill_step_size=self._chunk,
            completion_batch_size=MAX_STREAMS,
        )
        return sum(len(token_ids) for token_ids in response.token_ids or [])


class MlxServer:
    """mlx-lm's server over HTTP, one connection per stream."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/completions"

    def complete(self, prompts: Sequence[Prompt], tokens: int) -> int:
        """See measure.Offline: concurrent streaming clients."""

        async def all_of_them() -> int:
            return sum(await asyncio.gather(*(self._count(prompt, tokens) for prompt in prompts)))

        return asyncio.run(all_of_them())

    async def _count(self, prompt: Prompt, tokens: int) -> int:
        count = 0
        async for event in self._events(prompt, tokens):
            count += int((event.get("usage") or {}).get("completion_tokens", 0))
        return count

    async def stream(self, prompt: Prompt, tokens: int) -> AsyncIterator[None]:
        """See measure.Streaming; the server sends a piece of text for nearly every token."""
        async for event in self._events(prompt, tokens):
            if any(choice.get("text") for choice in event.get("choices", ())):
                yield None

    async def _events(self, prompt: Prompt, tokens: int) -> AsyncIterator[dict[str, Any]]:
        import aiohttp

        body = {
            "prompt": prompt.text,
            "max_tokens": tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        unlimited = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(timeout=unlimited) as session,
            session.post(self._url, json=body) as response,
        ):
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))


@contextlib.contextmanager
def _mlx_server(spec: Spec, model: Path) -> Iterator[MlxServer]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The default model is loaded when the server starts; "bundled" is decided by this module, as for MlxBatch.
    command = [sys.executable, __file__, spec.name, "--model", str(model), "--port", str(port)]
    command += ["--prefill-step-size", str(spec.chunk), "--log-level", "WARNING"]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(process, url)
        yield MlxServer(url)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(process: "subprocess.Popen[bytes]", url: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"mlx-lm's server ended with status {process.returncode}")
        try:
            straight.open(f"{url}/health", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"mlx-lm's server did not answer within {limit_s:g} s")


def bind_blas(spec: Spec) -> None:
    """Give MLX in this process our BLAS, unless the spec wants what mlx-lm installs."""
    if not spec.bundled_blas:
        from pomarium.worker import blas

        blas.load(os.environ, narrow=spec.narrow)


def _serve_mlx() -> None:
    """Entry point of the server's process: our BLAS, then mlx-lm's own main with its own arguments."""
    spec = spec_of(sys.argv.pop(1))
    from mlx_lm import server

    bind_blas(spec)
    probe.note()
    server.main()


if __name__ == "__main__":
    _serve_mlx()
