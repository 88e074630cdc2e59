"""Settings of all tests.

hypothesis has no deadline: the first example of a property compiles MLX functions with g++, and CI machines are slow.
Many tests share a process with engines that were started in it, so what those leave behind is put back.
"""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("pomarium", deadline=None)
settings.load_profile("pomarium")


@pytest.fixture(autouse=True)
def pomarium_logger() -> Iterator[None]:
    """A worker sends our log lines where vLLM's go; the next test starts without that."""
    logger = logging.getLogger("pomarium")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
