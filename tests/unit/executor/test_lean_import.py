"""vLLM is whole after a lean import, and torch's compiler there for who asks."""

import gc
import subprocess
import sys

import pytest

from pomarium.cluster.executor.lean_import import without_collections

SCRIPT = """
import sys
from pomarium.cluster.executor.lean_import import import_vllm, without_collections
with without_collections():
    import_vllm()
    import pomarium.cluster.executor.host
assert "torch._inductor.lowering" not in sys.modules
import_vllm()
from vllm.platforms import current_platform
print(current_platform.device_name)
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
import torch._inductor.lowering
"""


@pytest.mark.e2e
def test_the_compiler_is_not_loaded_and_not_lost() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split()[-2:] == ["mlx", "2.0"]


def test_collections_resume_even_after_a_failure() -> None:
    with pytest.raises(ImportError), without_collections():
        raise ImportError
    assert gc.isenabled()
