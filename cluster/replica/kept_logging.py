"""Keeps what Ray Serve's log handlers write to, whoever configures Python's logging later in the same process.

`logging.config.dictConfig` closes all handlers that there are, and a closed MemoryHandler forgets its target. vLLM
calls it when it is imported; Ray Serve writes a replica's log through such a handler, and tells a new controller the
file that it writes to (ray/serve/_private/logging_utils.py, get_component_logger_file_path): without a target the
replica fails that question, and the controller stops it for a faulty start. Its log lines would stay in memory, too.
"""

import logging
import logging.config
from collections.abc import Iterator
from logging.handlers import MemoryHandler


class KeepingConfigurator(logging.config.DictConfigurator):
    """Gives each MemoryHandler of a logger its target back. A closed file handler opens its file again by itself."""

    def configure(self) -> None:
        """See DictConfigurator."""
        targets = [(handler, handler.target) for handler in _memory_handlers()]
        try:
            super().configure()
        finally:
            for handler, target in targets:
                if handler.target is None and target is not None:
                    handler.setTarget(target)


def install() -> None:
    """From now on, for all of this process (logging.config.dictConfigClass is the standard library's hook for it)."""
    logging.config.dictConfigClass = KeepingConfigurator


def _memory_handlers() -> Iterator[MemoryHandler]:
    named = [known for known in logging.root.manager.loggerDict.values() if isinstance(known, logging.Logger)]
    for logger in (logging.root, *named):
        yield from (handler for handler in logger.handlers if isinstance(handler, MemoryHandler))
