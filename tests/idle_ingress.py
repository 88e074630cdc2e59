"""An ingress whose engines nobody asks, over a rack of which a test says the state: no Ray runs.

RackStatus, Serve's word on the model --> Ingress --asked: one answer; endpoint_stub.app_serving: a URL
"""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.rack.labels import MacFacts
from pomarium.cluster.rack.reports import ReplicaReport, StageReport
from pomarium.cluster.rack.roster import Member
from pomarium.cluster.rack.status import RackStatus

GIB = 1 << 30
VERSION = "0.1.0-py3.11"
FACTS = MacFacts("mac-1", "M2 Ultra", 192 * GIB, 128 * GIB, 6e11, 1e13, VERSION)
MAC = Member("mac-1", "10.0.0.1", True, True, FACTS)
REPORT = ReplicaReport("m", "r1", 30, (StageReport("mac-1", 0, 30, 7, GIB),), (), 12.5, 3, 1, 40.0, 0.25, 0.5, 1000.0)
SERVES = RackStatus("10.0.0.1:6379", False, (MAC,), (REPORT,), VERSION, at=1000.0)
"""One Mac that serves all of the model `m`."""


class Handle:
    """Of an engine that nobody asks."""

    def __init__(self, name: str) -> None:
        self.deployment_name = f"engine:{name}"


def ingress(
    keys: frozenset[str] = frozenset(),
    look: Callable[[], RackStatus] = lambda: SERVES,
    states: Callable[[], dict[str, State]] = lambda: {"m": State(running=1)},
) -> Ingress:
    """An ingress of the models that `states` names, with what Serve says of each."""
    engines: dict[str, Any] = {name: Handle(name) for name in states()}
    made = Ingress(engines, keys, served={name: Served(name, 8) for name in engines}, look=look)
    made._reasons = Reasons(lambda: {f"engine:{name}": state for name, state in states().items()})
    return made


def asked(path: str, keys: frozenset[str] = frozenset(), **headers: str) -> httpx.Response:
    """What the ingress answers."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=ingress(keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://pomarium") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())
