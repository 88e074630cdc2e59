"""Worker processes that are started ahead of their engine, so that they import vLLM while the engine's processes do.

    Serve replica --start--> worker processes              (both import vLLM)
          |       --offer--> POMARIUM_WORKERS, inherited by --> EngineCore: RackExecutor --offered--> connect

The replica owns the processes: Ray ends them with it. The engine drives them: they end when its stream does. Where
nobody offers any (`vllm.LLM`, `vllm serve`), the executor starts its own.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pomarium.cluster.executor.actor import Endpoint
from pomarium.cluster.executor.member import Contact, Member
from pomarium.cluster.node.worker_environment import HANDED_OVER


@contextmanager
def offer(members: Sequence[Member], environ: MutableMapping[str, str]) -> Iterator[None]:
    """While the context is open, an engine that starts with `environ` takes these workers, in rank order.

    The tokens are as visible as Ray's own: to this user, in the environment of the engine's process.
    """
    environ[HANDED_OVER] = json.dumps([asdict(member) for member in members])
    try:
        yield
    finally:
        del environ[HANDED_OVER]


def offered(environ: Mapping[str, str], count: int) -> tuple[Member, ...] | None:
    """The workers that were started for this engine; None if it has to start its own.

    Raises:
        ValueError: if they are not `count`.
    """
    if (text := environ.get(HANDED_OVER)) is None:
        return None
    members = tuple(_member(entry) for entry in json.loads(text))
    if len(members) != count:
        raise ValueError(f"{len(members)} workers were started for an engine of {count}")
    return members


def _member(entry: dict[str, Any]) -> Member:
    contact = Contact(Endpoint(**entry["contact"]["endpoint"]), entry["contact"]["token"])
    layers = None if entry["layers"] is None else (entry["layers"][0], entry["layers"][1])
    return Member(contact, entry["mac"], entry["source"], layers, entry["workers"])
