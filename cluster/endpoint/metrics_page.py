"""Prometheus text: what Ray's agents export (Ray's own series, Serve's, vLLM's and ours), of all machines, as one page.

vLLM publishes through `ray.util.metrics`, so that its series arrive at the agent of the machine they come from. Beside
them stands `pomarium_macs`, which no agent knows: how many Macs of the rack are in which state.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import ray

from pomarium.cluster.rack import power_states, roster
from pomarium.cluster.rack.mac_power import LOST, MacPower, Power, without_node
from pomarium.cluster.rack.roster import Member
from pomarium.worker.address import http_url
from pomarium.worker.errors import SettingsError

logger = logging.getLogger(__name__)

FETCH_S = 5.0

MACS = "pomarium_macs"


def addresses(nodes: Iterable[Mapping[str, Any]]) -> list[str]:
    """URL of each living node's exporter, from `ray.nodes()`."""
    return [
        f"{http_url(n['NodeManagerAddress'], n['MetricsExportPort'])}/metrics"
        for n in nodes
        if n["Alive"] and n["MetricsExportPort"]
    ]


def merge(pages: Iterable[str]) -> str:
    """Several pages as one: all samples of a metric together, under one HELP and TYPE, as the format requires."""
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                known = comments.setdefault(family, [])
                if not any(c.startswith(line[:7]) for c in known):
                    known.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(line)
    lines = [line for family in samples for line in comments.get(family, []) + samples[family]]
    return "\n".join(lines) + "\n" if lines else ""


def macs_by_state(powers: Iterable[MacPower], members: Iterable[Member]) -> dict[str, int]:
    """How many Macs are in each state; empty where no member is a Mac and none is told of.

    Args:
        powers: what the autoscaler tells; empty for a rack that wakes and puts to sleep nobody, whose Macs are awake
            or lost.
        members: live nodes, and those that were lost.
    """
    told = {mac.name: mac.state for mac in powers}
    alive = {member.name: member.alive for member in members if member.facts is not None and not member.drained}
    if not told and not alive:
        return {}
    states = list(Power) if told else [Power.AWAKE]
    found = Counter(_state(told.get(name), alive.get(name)) for name in told.keys() | alive.keys())
    return {state: found[state] for state in [*map(str, states), LOST]}


def _state(told: Power | None, alive: bool | None) -> str:
    """Of a Mac. `alive`: of its node; None if Ray knows none, or it left by itself."""
    if alive:  # whoever woke it, unless it is on its way to sleep
        return Power.RETIRING if told is Power.RETIRING else Power.AWAKE
    return without_node(told)


def macs_page(counts: Mapping[str, int]) -> str:
    """`macs_by_state` as Prometheus text."""
    if not counts:
        return ""
    samples = [f'{MACS}{{state="{state}"}} {count}' for state, count in counts.items()]
    return "\n".join([f"# HELP {MACS} Macs of the rack by state.", f"# TYPE {MACS} gauge", *samples, ""])


async def collect() -> str:
    """The page of this moment. Machines that do not answer are left out."""
    nodes, macs = await asyncio.gather(asyncio.to_thread(ray.nodes), asyncio.to_thread(_macs))
    return merge([macs, *await fetched(addresses(nodes))])


def _macs() -> str:
    try:
        members = roster.read(roster.client_of(ray.get_runtime_context().gcs_address))
    except SettingsError as error:
        logger.warning("/metrics is without %s: %s", MACS, error)
        return ""
    return macs_page(macs_by_state(power_states.read_all(), members))


async def fetched(urls: Iterable[str]) -> list[str]:
    """The pages that answer, and no proxy of the environment for them."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_S), trust_env=False) as session:
        pages = await asyncio.gather(*(_fetch(session, url) for url in urls), return_exceptions=True)
    return [page for page in pages if isinstance(page, str)]


async def _fetch(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        response.raise_for_status()
        return await response.text()
