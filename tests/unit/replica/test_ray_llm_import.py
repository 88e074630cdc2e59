"""Replicas that start together: Ray's registry refuses what another process entered meanwhile, and is asked again."""

import subprocess
import sys

SCRIPT = """
import sys
from ray.llm._internal.serve.utils.registry import ComponentRegistry
from pomarium.cluster.replica import ray_llm

asked = {}
def contains(self, name):  # another process enters each name just after it was asked for
    asked[name] = asked.get(name, 0) + 1
    return asked[name] > 1
ComponentRegistry.contains = contains
ray_llm.import_registry()
assert ray_llm.FACTORY in sys.modules
assert len(asked) >= 4 and all(count > 1 for count in asked.values()), asked
ray_llm.import_registry()
"""


def test_a_registry_that_another_process_fills_at_the_same_time() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
