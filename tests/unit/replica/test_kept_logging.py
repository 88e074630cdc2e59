"""A log handler of Ray Serve's kind goes on to write whoever configures logging after it."""

import logging
import logging.config
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from pomarium.cluster.replica import kept_logging


@pytest.fixture
def handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryHandler]:
    monkeypatch.setattr(logging.config, "dictConfigClass", logging.config.DictConfigurator)
    logger = logging.getLogger("kept.logging")
    made = MemoryHandler(100, target=logging.FileHandler(tmp_path / "log"))
    logger.addHandler(made)
    yield made
    logger.removeHandler(made)
    made.close()


def configure() -> None:
    """As vLLM does on import."""
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})


def test_without_it_the_target_is_forgotten(handler: MemoryHandler) -> None:
    configure()
    assert handler.target is None


def test_the_target_is_kept_and_written_to(handler: MemoryHandler, tmp_path: Path) -> None:
    kept_logging.install()
    logger = logging.getLogger("kept.logging")
    logger.warning("before")
    configure()
    logger.warning("after")
    assert isinstance(handler.target, logging.FileHandler)
    handler.flush()
    assert (tmp_path / "log").read_text().split() == ["before", "after"]
