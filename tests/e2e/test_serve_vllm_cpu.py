"""`pomarium serve` with VLLM_METAL_USE_MLX=0: vLLM's own CPU backend and worker process behind the same endpoint."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from serve_process import READY_S, STOP_S, Server
from tiny_models import build, write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(900)]

SHAPE = {"head_dim": 32, "hidden_size": 128, "max_position_embeddings": 1024}
"""vLLM's CPU attention has no heads of 8."""
PROMPT = [5, 9, 13, 40, 41, 42]
TOKENS = 8


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dense checkpoint, as that backend needs, with that backend switched on."""
    monkeypatch.setenv("VLLM_METAL_USE_MLX", "0")
    return str(write_checkpoint("llama", tmp_path / "tiny", **SHAPE))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.end()


def test_it_serves_the_tokens_that_mlx_lm_gives(model: str, server: Server) -> None:
    reference, tokens = build("llama", **SHAPE), list(PROMPT)
    for _ in range(TOKENS):
        tokens.append(int(mx.argmax(reference(mx.array([tokens]))[0, -1]).item()))
    server.arguments = [model, "--enforce-eager", "--dtype", "float32"]
    server.ensure()
    request = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=120).json()
    assert answer["choices"][0]["token_ids"] == tokens[len(PROMPT) :]


def test_the_reason_of_its_worker_process_is_shown(model: str, server: Server) -> None:
    process = server.start([model, "--port", "18736", "--enforce-eager", "--gpu-memory-utilization", "1.0"])
    assert process.wait(READY_S + STOP_S) == 1
    assert "is less than desired CPU memory utilization" in server.output.splitlines()[-1]
