"""A worker goes on to the next call while the device still computes what the last one gave."""

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from pomarium.cluster.executor.codec import decode, encode_call
from pomarium.cluster.executor.host import WorkerHost
from pomarium.proto import control_pb2 as pb

WAIT_S = 30.0


class Output(AsyncModelRunnerOutput):
    """Of a step that is computed once `done` is set."""

    def __init__(self, value: str, error: Exception | None = None) -> None:
        self.done = threading.Event()
        self._value, self._error = value, error

    def get_output(self) -> ModelRunnerOutput:
        assert self.done.wait(WAIT_S)
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # anything that can be pickled


class Host:
    """A WorkerHost on a thread, whose worker gives what the test puts here."""

    def __init__(self) -> None:
        self.began: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.outputs: dict[str, object] = {}
        self.reports: queue.SimpleQueue[pb.Report] = queue.SimpleQueue()
        self.calls: queue.SimpleQueue[pb.Call | None] = queue.SimpleQueue()
        host = WorkerHost(0)
        host._wrapper = SimpleNamespace(step=self._step)
        self._thread = threading.Thread(target=host.run, args=(self.calls, self.reports.put), daemon=True)
        self._thread.start()

    def _step(self, name: str) -> object:
        self.began.put(name)
        return self.outputs[name]

    def call(self, seq: int, name: str, output: object, *, wants_result: bool = True) -> None:
        self.outputs[name] = output
        payload = encode_call("step", (name,))
        self.calls.put(pb.Call(seq=seq, method="step", payload=payload, wants_result=wants_result))
        assert self.began.get(timeout=WAIT_S) == name

    def reported(self) -> tuple[int, object]:
        report = self.reports.get(timeout=WAIT_S)
        if report.HasField("failure"):
            return report.failure.seq, report.failure.message
        return report.result.seq, decode(report.result.payload)

    def end(self) -> None:
        self.calls.put(None)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.end()


def test_the_next_call_begins_before_the_last_output_is_read_and_reports_keep_their_order(host: Host) -> None:
    first, second = Output("first"), Output("second")
    host.call(1, "a", first)
    host.call(2, "b", "nobody wants it", wants_result=False)
    host.call(3, "c", second)
    host.call(4, "d", "at once")
    assert host.reports.empty()
    second.done.set()
    assert host.reports.empty()
    first.done.set()
    assert [host.reported() for _ in range(3)] == [(1, "first"), (3, "second"), (4, "at once")]
    host.call(5, "e", "nothing waits any more")
    assert host.reported() == (5, "nothing waits any more")


def test_a_device_that_fails_late_is_reported_as_its_calls_failure(host: Host) -> None:
    failing = Output("", RuntimeError("the device is gone"))
    host.call(1, "a", failing)
    failing.done.set()
    seq, said = host.reported()
    assert seq == 1
    assert "the device is gone" in str(said)
    host.call(2, "b", "the next one")
    assert host.reported() == (2, "the next one")
