"""What modules share ends with the last test that asks for it, and those modules come first (sharing.py)."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
CONFTEST = """
import pytest
from sharing import pytest_collection_modifyitems, pytest_runtest_teardown, share

@pytest.fixture
def guarded_server(request):
    share(request, lambda: print("END"))
"""
ALONE = "def test_alone(): print('ALONE')"
USES = "def test_one(guarded_server): print('USE')\ndef test_two(): print('BETWEEN')\n"


def test_modules_run_in_a_row_and_it_ends_after_the_last_that_asks(tmp_path: Path) -> None:
    for name, content in (("conftest", CONFTEST), ("test_a", ALONE), ("test_b", USES), ("test_c", USES)):
        (tmp_path / f"{name}.py").write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = [word for word in done.stdout.replace(".", " ").split() if word.isupper()]
    assert said == ["USE", "BETWEEN", "USE", "END", "BETWEEN", "ALONE"]
