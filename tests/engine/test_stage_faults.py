"""A fault on any stage reaches the engine at once and with its reason, whichever stage and whatever it was.

Stages are threads here (staged_engine.py); processes and machines are killed in tests/rack and test_rack_serving.py.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_process import generate
from staged_engine import StageThread, staged
from tiny_models import write_checkpoint
from vllm import LLM, SamplingParams

from pomarium.cluster.executor.codec import WorkerError
from pomarium.worker.handoff.errors import HandoffError

pytestmark = pytest.mark.e2e

FAULT_S = 10.0
BOUNDS = [0, 1, 3, 4]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama")


def fault_while_generating(llm: LLM, fault: Callable[[], None]) -> tuple[Exception, float]:
    """What the engine raises, and how long after the fault."""
    at: list[float] = []

    def strike() -> None:
        time.sleep(0.3)
        at.append(time.monotonic())
        fault()

    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the tests look at it
        _generate_for_ever(llm)
    assert at, "the engine failed before the fault"
    return caught.value, time.monotonic() - at[0]


def _generate_for_ever(llm: LLM) -> None:
    while True:
        generate(llm, [[7, 8, 9]] * 4, LONG)


def raise_in(stage: StageThread) -> None:
    def broken(step: object) -> bool:
        raise ValueError("a stage's own fault")

    stage.host.worker.runner.execute = broken


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_exception_on_a_stage(model: Path, rank: int) -> None:
    with staged(model, BOUNDS) as (llm, stages):
        error, seconds = fault_while_generating(llm, lambda: raise_in(stages[rank]))
    assert isinstance(error, WorkerError)
    assert f"worker {rank} (on mac-{rank}" in str(error)
    assert "a stage's own fault" in str(error)
    assert seconds < FAULT_S


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_link_that_breaks_for_good(model: Path, rank: int) -> None:
    """The stage's server is gone while its process lives: its neighbours cannot resume."""
    with staged(model, BOUNDS) as (llm, stages):
        links = stages[rank].host.worker._stage.links
        error, seconds = fault_while_generating(llm, lambda: links._server.fail(HandoffError("the link was cut")))
    assert "handoff" in str(error) or "the link was cut" in str(error)
    assert seconds < FAULT_S
