"""Serve's side of benchmarks/routing.py: one request router that asks whichever policy a request names in `user`.

    the ingress's process imports this module --patch--> its keys also keep the body, and each request is a call

Apart from the script, which must not import Ray before it has set Ray's environment.
"""

from dataclasses import replace
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from pomarium.cluster.endpoint import ingress
from pomarium.cluster.endpoint.prefix_router import PrefixRouter
from pomarium.cluster.endpoint.reading import Asking, Reader
from pomarium.cluster.http import bodies
from pomarium.cluster.http.prompts import prompt_text
from pomarium.cluster.replica.replica import Routing

ROUTERS: dict[str, Any] = {
    "power of two": PowerOfTwoChoicesRequestRouter,
    "Ray Serve LLM": PrefixCacheAffinityRouter,
    "Pomarium": PrefixRouter,
}


class SideBySide(PrefixRouter, PrefixCacheAffinityRouter):
    """Asks the policy that a request names."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The answer of the policy that `user` names; a health check names none."""
        policy = ROUTERS.get(_fields(pending_request).get("user", ""), PowerOfTwoChoicesRequestRouter)
        chosen: list[list[RunningReplica]] = await policy.choose_replicas(self, candidate_replicas, pending_request)
        return chosen

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """The policy that sent a request remembers it."""
        policy = ROUTERS.get(_fields(pending_request).get("user", ""), PowerOfTwoChoicesRequestRouter)
        policy.on_request_routed(self, pending_request, replica_id, result)

    def _extract_text_from_request(self, pending_request: PendingRequest) -> str:
        return prompt_text(_fields(pending_request))


class Keys(tuple[int, ...]):
    """Keys of a prompt, and the body that has it."""

    fields: dict[str, Any]


_read = Reader._read


def _with_body(reader: Reader, path: str, body: bytes) -> Asking:
    asking = _read(reader, path, body)
    keys = Keys(asking.routing.keys)
    keys.fields = bodies.parsed(body)
    return replace(asking, routing=Routing(keys))


Reader._read = _with_body  # type: ignore[method-assign]
ingress.dispatch = lambda *_: None


def _fields(request: PendingRequest | None) -> dict[str, Any]:
    """The body of an engine's request."""
    if request is None or request.metadata.call_method != "request":
        return {}
    keys: Keys = request.args[0].keys
    return keys.fields
