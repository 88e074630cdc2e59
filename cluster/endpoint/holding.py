"""A request for a model that has no engine now and may get one: held until there is one, or until there is no hope.

    Reasons.state: what Serve and waiting replicas say --verdict, each second--> None: hold on; a sentence: refuse

A model may be without engines for that its Macs sleep (`min: 0`). The request itself is what wakes them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pomarium.cluster import faults
from pomarium.cluster.replica.heartbeat import SILENCE_S

LOOK_S = 1.0
LONGEST_S = 900.0
"""Two Macs that fail to wake, a third that does, and a model that is loaded."""
GRACE_S = 15.0
"""For this long a request is held although no Mac can be woken: one may be on its way to the rack."""
SILENT = "its engine does not answer"


@dataclass(frozen=True)
class State:
    """What is known of a deployment.

    Attributes:
        message: Serve's, or of a replica that waits for Macs; "" if there is nothing to say.
        running: engines that serve. there: those whose processes exist, coming and ending ones too.
        waiting: a replica lacks Macs. waking: Macs are being woken for it.
        lost: what the last engine died of, a clause; None: none of late.
    """

    message: str = ""
    running: int = 0
    waiting: bool = False
    waking: bool = False
    lost: str | None = None
    there: int = 0


def verdict(state: State, held_s: float, served_s: float) -> str | None:
    """Why a request is to be held no longer; None: hold it.

    Args:
        held_s: so far, seconds. served_s: for how long there has been an engine that did not take it, seconds.
    """
    if served_s > SILENCE_S:
        return SILENT
    if held_s > LONGEST_S:
        return f"no Mac woke within {LONGEST_S:g} s"
    if state.running or state.waking:
        return None
    sentence = faults.marked_sentence(state.message)
    if sentence is None or (state.waiting and held_s < GRACE_S):
        return None
    return sentence


class HopelessError(Exception):
    """The request is held no longer; says why."""


async def held(first: Awaitable[Any], state: Callable[[], Awaitable[State]]) -> Any:
    """What `first` gives, however long that takes. Raises HopelessError, and whatever `first` raises.

    Args:
        state: of the deployment, now.
    """
    coming = asyncio.ensure_future(first)
    began, served_since = time.monotonic(), None
    try:
        while True:
            await asyncio.wait({coming}, timeout=LOOK_S)
            if coming.done():
                return coming.result()
            now, seen = time.monotonic(), await state()
            served_since = (served_since or now) if seen.running else None
            reason = verdict(seen, now - began, 0.0 if served_since is None else now - served_since)
            if reason is not None:
                raise HopelessError(reason)
    finally:
        coming.cancel()
