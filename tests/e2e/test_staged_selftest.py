"""`pomarium selftest --stages`: the embedded model over two worker processes against mlx-lm, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(400)]


def test_two_stages_compute_what_mlx_lm_does(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "VLLM_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pomarium.cluster.cli.main", "selftest", "--stages", "2", "--share-macs"],
        env=environ | {"XDG_STATE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selftest: passed" in done.stdout
    stages = re.search(r"where +layers 0-(\d+) on \S+; layers (\d+)-29 on", done.stdout)
    assert stages is not None, done.stdout
    assert int(stages[2]) == int(stages[1]) + 1
    assert not done.stderr
