"""vLLM's own command with our platform: `vllm serve DIR` answers, on MLX."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pomarium.worker.models import embedded

READY_S = 240.0

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_vllm_serve_answers_from_our_worker(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(embedded.path()), "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
    try:
        deadline = time.monotonic() + READY_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        body = {"model": "m", "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"].startswith(" Paris")
        deep = b'{"metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
        refused = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            content=deep,
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert refused.status_code == 400
        assert "nested deeper" in refused.json()["error"]["message"]
        assert "KV pool: " in log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
