"""A wheel of pomarium, installed by uv into an empty environment, sets itself up and serves."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pure_checkout import pip_cache
from serve_process import MODEL, Server
from wheel_build import build_wheel

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(1800)]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_uv_installs_the_command_which_installs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (uv := shutil.which("uv")) is None:
        pytest.skip("uv is not installed")
    for name, folder in (("HOME", "home"), ("UV_TOOL_DIR", "tools"), ("UV_TOOL_BIN_DIR", "bin")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    cache = os.environ.get("PIP_CACHE_DIR") or pip_cache()
    monkeypatch.setenv("PIP_CACHE_DIR", cache)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    subprocess.run([uv, "tool", "install", "--python", "3.11", build_wheel(tmp_path)], check=True, timeout=300)
    pomarium = tmp_path / "bin/pomarium"
    early = subprocess.run([pomarium, "serve"], capture_output=True, text=True, timeout=60, check=False)
    assert "`pomarium setup` installs what pomarium needs" in early.stderr
    subprocess.run([pomarium, "setup"], check=True, timeout=1500)

    server = Server(tmp_path / "home", python=str(tmp_path / "tools/pomarium/bin/python"))
    try:
        server.ensure()
        answer = server.client().chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16)
        assert "Paris" in (answer.choices[0].message.content or "")
        server.interrupt()
    finally:
        server.kill()
