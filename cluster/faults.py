"""From a pile of tracebacks to the one sentence that tells what to change.

An engine that does not start fails in one of three processes. What fails in the replica is an exception there. What
fails in vLLM's EngineCore process, or in a worker that it drives, reaches the replica only as "Engine core
initialization failed": therefore `record_engine_core_faults`, called in that process by our executor, hands the
sentence on through a file that the replica names in its environment; where vLLM's own backend serves, our plugin calls
`record_backend_faults` in each of its processes. In the same folder stands what an engine that served has died of: the
worker that our executor lost (`record_loss`), else what EngineCore logged last. Serve passes a replica's failure to the
command line as text: therefore `StartError` marks the sentence in it, and `marked_sentence` finds it.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pomarium.cluster.machine.disk import is_full
from pomarium.cluster.placement.context_length import reworded
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)

FILE_VARIABLE = "POMARIUM_FAULT_FILE"
ENGINE_CORE_LOGGER = "vllm.v1.engine.core"
WORKER_PROCESS_LOGGER = "vllm.v1.executor.multiproc_executor"
"""Where a worker process of vLLM's own executor logs what ends it: it tells EngineCore no more than that it ended."""
_LAST, _LOST = ".last", ".lost"
"""Suffixes of the files beside FILE_VARIABLE's: what was logged last, and what the executor has lost."""
_MARK = "pomarium-start-error:"
_WRAPPERS = ("Failed to create vLLM engine config: ",)


class StartError(PomariumError):
    """An engine did not start. The text carries the sentence, marked, so that it survives Serve's formatting."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"{_MARK}{json.dumps(sentence)}")


def marked_sentence(text: str) -> str | None:
    """The sentence of the first StartError that `text` (a status message with tracebacks) quotes, or None."""
    found = re.search(re.escape(_MARK) + r'("(?:[^"\\]|\\.)*")', text)
    return str(json.loads(found.group(1))) if found else None


def sentence(error: BaseException) -> str:
    """What `error` comes down to, as one line.

    A PomariumError anywhere among its causes is the answer; else vLLM's own validation message; else the innermost
    cause's type and first line.
    """
    chain = list(_causes(error))
    for e in chain:
        if isinstance(e, PomariumError):
            return one_line(str(e))
    for e in chain:
        if is_full(e):
            where = f" where {e.filename} was to be written" if isinstance(e, OSError) and e.filename else ""
            return f"No space is left on the disk{where}: make room there."
    for e in chain:
        if isinstance(e, ValidationError):
            return one_line(reworded(_validation_message(str(e))))
    for e in chain:
        for wrapper in _WRAPPERS:
            if str(e).startswith(wrapper):
                return one_line(reworded(_validation_message(str(e).removeprefix(wrapper))))
    last = chain[-1]
    first_line = next((line for line in str(last).splitlines() if line.strip()), "no message")
    return one_line(f"{type(last).__name__}: {first_line}")


def one_line(text: str) -> str:
    """`text` without line breaks or runs of blanks."""
    return " ".join(text.split())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, and so on. A Ray error carries what the remote side raised."""
    from ray.exceptions import RayTaskError

    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        remote = current.cause if isinstance(current, RayTaskError) else None
        if remote is None:  # else its text is the remote traceback, and its type may be that of its cause as well
            yield current
        current = remote or current.__cause__ or current.__context__


def _validation_message(text: str) -> str:
    """The message in pydantic's frame: "1 validation error for X / field / Value error, MESSAGE [type=...]"."""
    head, _, rest = text.partition("\n")
    if "validation error" not in head:
        return text
    message = re.split(r"\s\[type=\w+, input_value=", rest)[0]
    field, _, inner = message.partition("\n") if not message.startswith(" ") else ("", "", message)
    if found := re.match(r"\s*(?:Value|Assertion) (?:error|failed), (.*)", inner, re.S):
        return found.group(1)
    return f"{field}: {inner}" if field else inner


@dataclass(frozen=True)
class Loss:
    """What an engine died of. rank: of the worker that is gone without a word, if it was that."""

    sentence: str
    rank: int | None = None


class _FaultFile(logging.Handler):
    """Writes the sentences of the first and of the last exception that was logged, as long as there is the folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info or not record.exc_info[1] or not self._path.parent.exists():
            return
        text = json.dumps(sentence(record.exc_info[1]))
        try:
            if not self._path.exists():
                _write(self._path, text)
            _write(self._path.with_suffix(_LAST), text)
        except OSError:  # a full disk must not end what logs
            self.handleError(record)


def record_engine_core_faults() -> None:
    """In vLLM's EngineCore process: from now on hand the first fault that it logs to the replica that started it.

    Does nothing where no replica asked for it (`vllm serve`, `vllm.LLM`).
    """
    _record(ENGINE_CORE_LOGGER)


def record_backend_faults() -> None:
    """The same in any process of vLLM's own backend, worker processes included; may be called repeatedly."""
    _record(ENGINE_CORE_LOGGER)
    _record(WORKER_PROCESS_LOGGER)


def record_loss(error: Exception, rank: int | None) -> None:
    """In vLLM's EngineCore process: the engine ends for this. rank: see Loss. Only the first time counts."""
    if path := os.environ.get(FILE_VARIABLE):
        lost = Path(path).with_suffix(_LOST)
        try:
            if lost.parent.exists() and not lost.exists():
                _write(lost, json.dumps([sentence(error), rank]))
        except OSError:  # a full disk must not keep anybody from ending the engine
            logger.warning("What the engine ended of could not be left to its replica.", exc_info=True)


def recorded_loss(path: Path) -> Loss | None:
    """What the engine whose processes were given `path` died of, as far as they could tell."""
    if (lost := path.with_suffix(_LOST)).exists():
        return Loss(*json.loads(lost.read_text()))
    last = recorded_sentence(path.with_suffix(_LAST))
    return None if last is None else Loss(last)


def _write(path: Path, text: str) -> None:
    """Whole or not at all: it may be read at any time."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def _record(name: str) -> None:
    logger = logging.getLogger(name)
    recorded = any(isinstance(handler, _FaultFile) for handler in logger.handlers)
    if (path := os.environ.get(FILE_VARIABLE)) and not recorded:
        logger.addHandler(_FaultFile(Path(path)))


def recorded_sentence(path: Path) -> str | None:
    """What a process of the engine handed over, or None."""
    return str(json.loads(path.read_text())) if path.exists() else None
