"""Settings of all tests.

hypothesis has no deadline: the first example of a property compiles MLX functions with g++, and CI machines are slow.
Many tests share a process with engines that were started in it, so what those leave behind is put back. What a test
computes itself it computes on the CPU, for whose float32 its bounds are: `pomarium selftest` is for GPUs.
"""

import gc
import logging
from collections.abc import Iterator

import leftovers
import mlx.core as mx
import pytest
from hypothesis import settings
from sharing import pytest_collection_modifyitems, pytest_runtest_teardown

__all__ = [
    "pomarium_logger",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_teardown",
    "pytest_unconfigure",
]

gc.disable()
settings.register_profile("pomarium", deadline=None)
settings.load_profile("pomarium")


def pytest_configure() -> None:
    """Where there is no GPU the CPU is the default anyway."""
    leftovers.pytest_configure()
    mx.set_default_device(mx.cpu)


def pytest_unconfigure() -> None:
    """What the run has started ends with it."""
    leftovers.pytest_unconfigure()


def pytest_collection_finish() -> None:
    """What was imported and collected stays: it is not looked through for garbage, neither now nor later."""
    gc.enable()
    gc.freeze()


@pytest.fixture(autouse=True)
def pomarium_logger() -> Iterator[None]:
    """A worker sends our log lines where vLLM's go; the next test starts without that."""
    logger = logging.getLogger("pomarium")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
