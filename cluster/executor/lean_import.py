"""Imports vLLM in about two thirds of the time: without torch's compiler and without garbage collections.

A start imports vLLM in three processes, and little else takes as long. In the two that are ours:

- vLLM patches torch's compiler as soon as it is imported, for which it loads all of it, and goes on where there is none
  (vllm/env_override.py catches the ImportError). Nothing is compiled here, so it finds none.
- Imports make millions of objects that stay; the collector looks through them again and again.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pomarium.cluster.provision import platform_choice

_COMPILER = "torch._inductor"


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection while the context is open, and none of what was made in it later on."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def import_vllm() -> None:
    """Import the package `vllm` while torch's compiler looks absent; whoever asks for the compiler later gets it.

    For processes whose engine runs on MLX: vLLM's own CPU backend compiles. Raises UnsupportedError if vLLM would take
    another platform here.
    """
    platform_choice.require()
    absent = _COMPILER not in sys.modules
    if absent:
        sys.modules[_COMPILER] = None  # type: ignore[assignment] # Python's mark of a module that cannot be imported
    try:
        importlib.import_module("vllm")
    finally:
        if absent:
            del sys.modules[_COMPILER]
