"""The one sentence behind a failed start, wherever it failed."""

import errno
import logging
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, field_validator
from ray.exceptions import RayTaskError

from pomarium.cluster import faults
from pomarium.cluster.faults import Loss
from pomarium.worker.errors import CheckpointError, PomariumError, SettingsError


class Config(BaseModel):
    length: int

    @field_validator("length")
    @classmethod
    def bounded(cls, length: int) -> int:
        if length > 8:
            raise ValueError(f"length {length} is greater than 8.\nLower it.")
        return length


def chained(*errors: Exception) -> Exception:
    """The last of `errors`, each raised while the one before was handled."""
    for error, later in pairwise(errors):
        later.__context__ = error
    return errors[-1]


@given(st.text(min_size=1))
def test_a_sentence_survives_serves_traceback_text(text: str) -> None:
    status = f'Traceback:\n  raise StartError("x")\nfaults.StartError: {faults.StartError(text)}\n\nmore "text"'
    assert faults.marked_sentence(status) == text


def test_text_without_mark_has_no_sentence() -> None:
    assert faults.marked_sentence("RuntimeError: boom") is None


def test_a_pomarium_error_below_other_errors_is_the_answer() -> None:
    error = chained(CheckpointError("The file is truncated."), RuntimeError("wrapped"), ValueError("outer"))
    assert faults.sentence(error) == "The file is truncated."


def test_a_remote_pomarium_error_is_the_answer() -> None:
    remote = RayTaskError("f", "Traceback ...\nlong", SettingsError("Unset it."))
    assert faults.sentence(remote) == "Unset it."


def test_vllm_validation_message_loses_its_frame() -> None:
    with pytest.raises(ValidationError) as caught:
        Config(length=9)
    assert faults.sentence(caught.value) == "length 9 is greater than 8. Lower it."
    with pytest.raises(ValidationError) as other:
        Config(length="nine")  # type: ignore[arg-type]
    assert faults.sentence(other.value).startswith("length: Input should be a valid integer")
    wrapped = RuntimeError(f"Failed to create vLLM engine config: {caught.value}")
    assert faults.sentence(wrapped) == "length 9 is greater than 8. Lower it."


def test_else_the_innermost_cause_speaks() -> None:
    error = chained(OSError("disk full\ndetails"), RuntimeError("wrapped"))
    assert faults.sentence(error) == "OSError: disk full"


def test_engine_core_hands_over_its_first_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fault.json"
    monkeypatch.setenv(faults.FILE_VARIABLE, str(file))
    logger = logging.getLogger(faults.ENGINE_CORE_LOGGER)
    before = list(logger.handlers)
    faults.record_engine_core_faults()
    try:
        for sentence in ("First.", "Second."):
            try:
                raise PomariumError(sentence)
            except PomariumError:
                logger.exception("EngineCore failed to start.")
    finally:
        logger.handlers = before
    assert faults.recorded_sentence(file) == "First."


def test_nothing_is_recorded_unless_a_replica_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(faults.FILE_VARIABLE, raising=False)
    before = list(logging.getLogger(faults.ENGINE_CORE_LOGGER).handlers)
    faults.record_engine_core_faults()
    assert logging.getLogger(faults.ENGINE_CORE_LOGGER).handlers == before
    assert faults.recorded_sentence(tmp_path / "none") is None


def test_a_worker_process_of_vllms_own_speaks_before_its_engine_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fault.json"
    monkeypatch.setenv(faults.FILE_VARIABLE, str(file))
    names = (faults.WORKER_PROCESS_LOGGER, faults.ENGINE_CORE_LOGGER)
    loggers = [logging.getLogger(name) for name in names]
    before = [list(logger.handlers) for logger in loggers]
    faults.record_backend_faults()
    faults.record_backend_faults()
    try:
        assert [len(logger.handlers) - len(b) for logger, b in zip(loggers, before, strict=True)] == [1, 1]
        for logger, reason in zip(loggers, ("Too little memory.", "WorkerProc initialization failed"), strict=True):
            try:
                raise ValueError(reason)
            except ValueError:
                logger.exception("failed to start.")
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers
    assert faults.recorded_sentence(file) == "ValueError: Too little memory."


def test_the_worker_that_was_lost_is_what_an_engine_died_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fault.json"
    monkeypatch.setenv(faults.FILE_VARIABLE, str(file))
    assert faults.recorded_loss(file) is None
    logger = logging.getLogger(faults.ENGINE_CORE_LOGGER)
    before = list(logger.handlers)
    faults.record_engine_core_faults()
    try:
        for sentence in ("Long ago.", "Of late."):
            try:
                raise PomariumError(sentence)
            except PomariumError:
                logger.exception("EngineCore encountered a fatal error.")
        assert faults.recorded_loss(file) == Loss("Of late.")
        faults.record_loss(PomariumError("worker 1 was lost"), 1)
        faults.record_loss(PomariumError("worker 0 was lost"), 0)
    finally:
        logger.handlers = before
    assert faults.recorded_loss(file) == Loss("worker 1 was lost", 1)
    assert faults.recorded_sentence(file) == "Long ago."


def test_nobody_asks_for_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(faults.FILE_VARIABLE, raising=False)
    faults.record_loss(PomariumError("lost"), None)
    monkeypatch.setenv(faults.FILE_VARIABLE, str(tmp_path / "gone" / "fault.json"))
    faults.record_loss(PomariumError("lost"), None)
    assert list(tmp_path.iterdir()) == []


def test_what_ray_hands_on_from_another_process_is_told_without_its_traceback() -> None:
    error = RayTaskError("call", "Traceback: ...", PomariumError("The disk is full.")).as_instanceof_cause()
    assert "Traceback" in str(error)
    assert faults.sentence(error) == "The disk is full."


def test_a_full_disk_keeps_no_engine_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(faults, "_write", full)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setenv(faults.FILE_VARIABLE, str(tmp_path / "fault.json"))
    faults.record_loss(PomariumError("lost"), 0)
    logger = logging.getLogger(faults.ENGINE_CORE_LOGGER)
    before = list(logger.handlers)
    faults.record_engine_core_faults()
    try:
        logger.error("failed", exc_info=PomariumError("x"))
    finally:
        logger.handlers = before
    assert faults.recorded_loss(tmp_path / "fault.json") is None
