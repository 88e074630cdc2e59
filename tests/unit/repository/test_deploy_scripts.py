"""The scripts of `deploy/` satisfy shellcheck, and those for macOS keep to bash 3.2."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[3] / "deploy"
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))


def shellcheck() -> str:
    beside = Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck is not installed: `make install-dev`")
        pytest.skip("shellcheck is not installed")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_satisfy_shellcheck(path: Path) -> None:
    result = subprocess.run([shellcheck(), "--shell=bash", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


NEWER_THAN_3_2 = re.compile(
    r"declare -A|local -[An]|mapfile|readarray|\$\{\w+(?:\^|,)|\|&|&>>|wait -n|coproc|printf -v \w+\[|\$\{\w+@|EPOCH"
)


@pytest.mark.parametrize("name", ["install.sh", "rotate_logs.sh", "setup.sh", "launchd/serve.sh"])
def test_scripts_for_macos_keep_to_bash_3_2(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert NEWER_THAN_3_2.findall(text) == []
    bare = re.findall(r'(?<!\+)"\$\{(?:arguments|at|more)\[@\]\}"', text)
    assert bare == [], "bash 3.2 takes an empty array for an unset variable"
