"""The clients that people bring along: programs of tests/clients, how they are installed, the table of docs/clients.md.

requirements.txt, package.json --python, node--> tests/clients/.venv, node_modules (kept for the next run)
Program --took(url, key, model)--> what each step gave; the last one leaves a stream      table() --> docs/clients.md
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "clients"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"

STEPS = ("chat", "stream", "tools", "structured", "error", "disconnect")
"""What each program does, in this order."""


@dataclass(frozen=True)
class Program:
    """One of tests/clients.

    Attributes:
        file: of it. packages: under test, as the pins name them. protocol: the paths that it asks.
    """

    file: str
    client: str
    packages: tuple[str, ...]
    protocol: str

    @property
    def in_python(self) -> bool:
        return self.file.endswith(".py")

    @property
    def versions(self) -> str:
        """Of its packages."""
        pins = python_pins() if self.in_python else node_pins()
        return ", ".join(f"{package} {pins[package]}" for package in self.packages)


PROGRAMS = (
    Program("openai_chat.py", "OpenAI's SDK, Python", ("openai",), "`/v1/chat/completions`"),
    Program("openai_responses.py", "OpenAI's SDK, Python", ("openai",), "`/v1/responses`"),
    Program("anthropic_messages.py", "Anthropic's SDK, Python", ("anthropic",), "`/v1/messages`"),
    Program("langchain_chat.py", "LangChain", ("langchain-openai",), "`/v1/chat/completions`"),
    Program("litellm_chat.py", "LiteLLM", ("litellm",), "`/v1/chat/completions`"),
    Program("openai_node.mjs", "OpenAI's SDK, Node", ("openai",), "`/v1/chat/completions`, `/v1/responses`"),
    Program("vercel_ai.mjs", "Vercel's AI SDK", ("ai", "@ai-sdk/openai-compatible"), "`/v1/chat/completions`"),
)


class NoNodeError(Exception):
    """There is no Node, or no npm."""


def python_pins() -> dict[str, str]:
    """Of requirements.txt."""
    lines = (FOLDER / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def node_pins() -> dict[str, str]:
    """Of package.json."""
    pins: dict[str, str] = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))["dependencies"]
    return pins


def python() -> str:
    """An interpreter that has the Python clients: in an environment of their own, since they pin what vLLM does too."""
    folder = FOLDER / ".venv"
    with _installed(folder, FOLDER / "requirements.txt") as missing:
        if missing:
            _ran(sys.executable, "-m", "venv", "--without-pip", str(folder))
            pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet")
            _ran(*pip, "install", "--no-deps", "--no-compile", "--requirement", str(FOLDER / "requirements.txt"))
    return str(folder / "bin" / "python")


def node() -> str:
    """A Node whose programs in tests/clients find their packages. Raises NoNodeError."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        raise NoNodeError("Node and npm are not installed")
    with _installed(FOLDER / "node_modules", FOLDER / "package.json") as missing:
        if missing:
            quiet = ("--no-audit", "--no-fund", "--loglevel=error")
            _ran(npm, "install", "--no-package-lock", "--ignore-scripts", *quiet)
    return found


@contextmanager
def _installed(folder: Path, pins: Path) -> Iterator[bool]:
    """Whether `folder` has to be filled anew: it is emptied, and what it was filled from is noted last."""
    stamp = folder / "pins"
    missing = not stamp.exists() or stamp.read_bytes() != pins.read_bytes()
    if missing:
        shutil.rmtree(folder, ignore_errors=True)
    yield missing
    stamp.write_bytes(pins.read_bytes())


def _ran(*command: str) -> None:
    subprocess.run(command, cwd=FOLDER, check=True, timeout=600)


@contextmanager
def took(program: Program, url: str, key: str, model: str) -> Iterator[dict[str, Any]]:
    """What each step gave. The program lives until the context ends: only its own hand closes the stream that it left.

    Raises AssertionError if a step failed.
    """
    interpreter = python() if program.in_python else node()
    command = [interpreter, str(FOLDER / program.file), url, key, model]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            gave: dict[str, Any] = {}
            for line in process.stdout:
                told = json.loads(line)
                gave[told["step"]] = told["got"]
                if told["step"] == STEPS[-1]:
                    break
            else:
                raise AssertionError(f"{program.file} ended after {list(gave)}:\n{process.stderr.read()}")
            yield gave
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def table() -> str:
    """Of docs/clients.md: what tests/e2e/test_clients.py has each program do."""
    rows = [f"| {one.client} | {one.versions} | {one.protocol} |{' yes |' * len(STEPS)}" for one in PROGRAMS]
    head = f"| client | version | asks | {' | '.join(STEPS)} |"
    return "\n".join([head, "|---" * (len(STEPS) + 3) + "|", *rows])


def saved() -> str:
    """The table as it stands on the page."""
    found = re.search(f"{BEGIN}\n(.*)\n{END}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"{PAGE.name} has no {BEGIN}"
    return found[1]


def save() -> None:
    """Write the table into the page."""
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(saved(), table()), encoding="utf-8")


if __name__ == "__main__":
    save()
