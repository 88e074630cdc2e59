"""`pomarium selftest` on this machine, as a user runs it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e


def test_this_machine_computes_what_mlx_lm_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pomarium.cluster.cli.main", "selftest"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "selftest: passed" in done.stdout
    assert "120 of 120 equal to mlx-lm's" in done.stdout
    assert "kernels   not run: there is no GPU here" in done.stdout
