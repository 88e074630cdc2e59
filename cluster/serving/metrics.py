"""Prometheus text: what Ray's agents export (Ray's own series, Serve's, vLLM's and ours), of all machines, as one page.

vLLM publishes through `ray.util.metrics`, so that its series arrive at the agent of the machine they come from.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import ray

FETCH_S = 5.0


def addresses(nodes: Iterable[Mapping[str, Any]]) -> list[str]:
    """URL of each living node's exporter, from `ray.nodes()`."""
    return [
        f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics"
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


async def collect() -> str:
    """The page of this moment. Machines that do not answer are left out."""
    nodes = await asyncio.to_thread(ray.nodes)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_S)) as session:
        pages = await asyncio.gather(*(_fetch(session, url) for url in addresses(nodes)), return_exceptions=True)
    return merge(page for page in pages if isinstance(page, str))


async def _fetch(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        response.raise_for_status()
        return await response.text()
