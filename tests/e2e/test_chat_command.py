"""`pomarium chat` at a terminal, with a model that `pomarium serve` serves."""

import os
import subprocess
import sys

import pytest
from serve_process import Server
from typed import CTRL_C, CTRL_D, Typed

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
