"""`pomarium chat` at a terminal, with a model that `pomarium serve` serves, for longer or for this chat."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from serve_process import Server
from typed import CTRL_C, CTRL_D, Typed

from pomarium.cluster.cli import chat
from pomarium.cluster.cli import main as cli
from pomarium.cluster.node import ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUESTION = "What is the capital of France?"


def test_an_answer_and_one_that_is_ended(server: Server) -> None:
    with Typed(["chat", "--url", server.url, "--temperature", "0"], os.environ) as typed:
        assert "smollm2 at " in typed.until("> ")
        typed.type(f"{QUESTION}\n")
        shown = typed.until("the first after")
        assert "Paris" in shown
        assert "tokens/s" in shown
        typed.until("> ")
        typed.type("Write a very long story about a river, with many chapters.\n")
        typed.until("chapters.")  # as it was typed
        typed.more(20)
        typed.type(CTRL_C)
        assert "stopped" in typed.until("> ")
        typed.type("/reset\n")
        typed.until("> ")
        typed.type(f"{QUESTION}\n")
        assert "Paris" in typed.until("the first after")
        typed.until("> ")
        typed.type(CTRL_D)
        assert typed.ended() == 0


def test_from_a_pipe(server: Server) -> None:
    command = [sys.executable, "-m", "pomarium.cluster.cli.main", "chat", "smollm2", "--url", server.url]
    done = subprocess.run(
        [*command, "--temperature", "0", "--max-tokens", "16"],
        input=f"{QUESTION}\n", capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "Paris" in done.stdout
    assert done.stderr.count("tokens") > 0


def test_an_endpoint_for_one_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing listens where it looks: it starts one, with the key that it has, and ends it."""
    monkeypatch.setattr(chat, "URL", f"http://127.0.0.1:{ports.free(1)[0]}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    before = {process.pid for process in psutil.Process().children()}
    assert cli.main(["chat", "--temperature", "0", "--max-tokens", "16", "--api-key", "secret"]) == 0
    found = capfd.readouterr()
    assert "Paris" in found.out
    assert "an endpoint is started for this chat" in found.err
    assert "ready " in found.err
    assert "stopped" in found.err
    assert {process.pid for process in psutil.Process().children()} <= before


def test_a_chat_that_is_told_to_end_ends_the_endpoint_that_it_starts(tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    code = (
        "import sys; from pomarium.cluster.cli import chat; from pomarium.cluster.cli.main import main; "
        f"chat.URL = 'http://127.0.0.1:{ports.free(1)[0]}'; sys.exit(main(['chat']))"
    )
    chatting = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, env=environ)
    try:
        while not (serving := psutil.Process(chatting.pid).children()):
            assert chatting.poll() is None
            time.sleep(0.1)
        chatting.send_signal(signal.SIGTERM)
        assert chatting.wait(300) == 128 + signal.SIGTERM
        assert not [process for process in serving if process.is_running()]
    finally:
        chatting.kill()
        chatting.wait()


def test_what_cannot_be_served_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "URL", f"http://127.0.0.1:{ports.free(1)[0]}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert cli.main(["chat", str(tmp_path / "nothing")]) == 1
    said = capfd.readouterr().err
    assert str(tmp_path / "nothing") in said
    assert said.splitlines()[-1] == "pomarium: No endpoint was started for this chat: what it said is above."
