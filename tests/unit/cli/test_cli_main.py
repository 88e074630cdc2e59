"""The command line as a whole, run as users run it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pomarium.cluster.cli import main as cli

HEAVY = ("vllm", "ray", "torch", "transformers")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pomarium.cluster.cli.main", *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.split()[0] == "pomarium"


def test_without_command_it_exits_2_with_the_usage() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pomarium")


MOST_MODULES = 750
"""After --help; it is 620 today."""


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Imports decide how long --help takes: their number is bounded, which no machine is too slow for."""
    code = (
        "import sys\n"
        "from pomarium.cluster.cli.main import parse\n"
        f"try: parse({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], len(sys.modules) < {MOST_MODULES})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY [] True"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    started = time.monotonic()
    assert cli.main([]) == cli.EXIT_INTERRUPTED
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("raised", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_an_interrupt_has_its_exit_code_wherever_it_came(raised: str, tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import sys\nfrom pomarium.cluster.cli import main as cli\n"
        f"def parse(_):\n    {raised}\ncli.parse = parse\nsys.exit(cli.main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "told"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (cli.EXIT_INTERRUPTED, "")
