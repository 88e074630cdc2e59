"""The probe measures a path's delay and rate, within bounded time."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from handoff_ends import FAST, TOKEN, Ends

from pomarium.worker.handoff.errors import PeerLostError
from pomarium.worker.handoff.probe import probe


@pytest.fixture
def ends() -> Iterator[Ends]:
    with closing(Ends()) as made:
        yield made


def test_the_probe_sees_delay_and_rate(ends: Ends) -> None:
    near = probe(ends.server.address, TOKEN, seconds=0.3)
    proxy = ends.proxy()
    proxy.delay_s, proxy.bytes_per_s = 0.02, 8e6
    far = probe(proxy.address, TOKEN, settings=FAST, seconds=0.6)
    assert near.rtt_s < 0.02 < 0.04 <= far.rtt_s < 1.0
    assert near.bandwidth_bytes_per_s > 2 * far.bandwidth_bytes_per_s > 0


def test_the_probe_is_bounded(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomarium.worker.handoff.probe.CONNECT_S", 0.3)
    proxy = ends.proxy()
    proxy.hold()
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="did not answer the probe"):
        probe(proxy.address, TOKEN, seconds=0.1)
    assert time.monotonic() - start < 3
