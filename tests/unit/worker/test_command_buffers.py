"""MLX_MAX_OPS_PER_BUFFER and _MB_ are there before MLX is, and the user's own are left alone."""

import subprocess
import sys

import pytest

from pomarium.worker.command_buffers import DEFAULTS, MEGABYTES, OPERATIONS, is_default, prepare


def test_each_variable_is_set_unless_the_user_did() -> None:
    environ: dict[str, str] = {}
    prepare(environ)
    assert environ == DEFAULTS
    assert all(is_default(name, value) for name, value in environ.items())
    environ = {OPERATIONS: "7", "MLX_METAL_FAST_SYNCH": "1"}
    prepare(environ)
    assert environ == {OPERATIONS: "7", "MLX_METAL_FAST_SYNCH": "1", MEGABYTES: DEFAULTS[MEGABYTES]}
    assert not is_default(OPERATIONS, "7")
    assert not is_default("PATH", "100")


SCRIPT = """
import os, sys
class AsMlxComes:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core":
            print("found", *(os.environ.get(f"MLX_MAX_{what}_PER_BUFFER") for what in ("OPS", "MB")), flush=True)
sys.meta_path.insert(0, AsMlxComes())
{imports}
"""

AS_A_LIBRARY = "from vllm import LLM"
AS_AN_ACTOR = """
from pomarium.cluster.executor.lean_import import import_vllm
import_vllm()
import pomarium.cluster.executor.host
"""


@pytest.mark.e2e
@pytest.mark.parametrize("imports", [AS_A_LIBRARY, AS_AN_ACTOR], ids=["vllm.LLM", "a worker's actor"])
def test_they_are_set_when_mlx_is_imported(imports: str) -> None:
    script = SCRIPT.replace("{imports}", imports)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert found == [f"found {DEFAULTS[OPERATIONS]} {DEFAULTS[MEGABYTES]}"]
