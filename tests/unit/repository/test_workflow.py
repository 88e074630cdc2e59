"""The workflow of Apple's runners: nothing runs it here, so its form and what its lines name are checked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pomarium.cluster.cli.main import parse

ROOT = Path(__file__).parents[3]
WORKFLOW = ROOT / ".github/workflows/macos.yml"
OF_MACOS = {"sw_vers", "sysctl", "xcode-select", "clang++", "/bin/bash", "mkdir", "tee", "cat", "make"}
"""What Apple's runners have beside our own commands (github.com/actions/runner-images, macos-15-arm64)."""


def document() -> dict[str, Any]:
    # YAML 1.1 takes the key `on` for true, GitHub does not: this loader makes strings only.
    loaded: dict[str, Any] = yaml.load(WORKFLOW.read_text(), Loader=yaml.BaseLoader)
    return loaded


def steps() -> list[dict[str, Any]]:
    (job,) = document()["jobs"].values()
    found: list[dict[str, Any]] = job["steps"]
    return found


def commands() -> list[list[str]]:
    """The words of each command of each step, without assignments and redirections."""
    lines = [line for step in steps() for line in step.get("run", "").splitlines()]
    parts = [part.split() for line in lines for part in re.sub(r"\d?>>?&?\S*( \"\S+\")?", "", line).split("|")]
    return [part for part in parts if part]


def place(text: str) -> int:
    return next(at for at, step in enumerate(steps()) if text in step.get("run", "") + step.get("uses", ""))


def test_it_satisfies_the_schema_of_workflows(tmp_path: Path) -> None:
    """check-jsonschema carries GitHub's schema."""
    command = [
        str(Path(sys.executable).parent / "check-jsonschema"),
        "--builtin-schema",
        "vendor.github-workflows",
        str(WORKFLOW),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOW.read_text().replace("runs-on:", "run-on:"))
    assert subprocess.run([*command[:-1], str(broken)], capture_output=True, check=False).returncode == 1


def test_each_command_exists() -> None:
    assert len(commands()) > 8
    for words in commands():
        assert words[0] in OF_MACOS or words[0] == ".venv/bin/pomarium", words


def test_each_target_of_make_exists() -> None:
    targets = {words[1] for words in commands() if words[0] == "make"} - {"--version"}
    assert targets == {"install-dev", "test-fast"}
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_each_subcommand_of_pomarium_exists() -> None:
    found = [words[1:] for words in commands() if words[0] == ".venv/bin/pomarium"]
    assert [words[0] for words in found] == ["selftest", "doctor"]
    for words in found:
        parse(words)


def test_the_self_test_comes_first_and_nothing_after_it_waits_for_it() -> None:
    first = place("pomarium selftest")
    assert place("make install-dev") == first - 1
    assert place("pomarium doctor") > first
    assert all(step.get("if") == "always()" for step in steps()[first + 1 :])
    assert all("if" not in step for step in steps()[: first + 1])


def test_its_report_is_kept_and_its_exit_code_counts() -> None:
    (job,) = document()["jobs"].values()
    assert job["defaults"]["run"]["shell"] == "bash", "GitHub's `bash` has pipefail, its default shell has not"
    kept = steps()[place("actions/upload-artifact")]["with"]["path"].split()
    assert job["env"]["REPORT"].removeprefix("${{ github.workspace }}/") in kept


def test_its_python_is_one_that_set_up_takes() -> None:
    wanted = steps()[place("actions/setup-python")]["with"]["python-version"]
    minor = int(wanted.removeprefix("3."))
    assert 11 <= minor <= 14


@pytest.mark.parametrize("step", [step["run"] for step in steps() if "run" in step])
def test_each_step_is_a_script_of_bash(step: str) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-n"], input=step, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
