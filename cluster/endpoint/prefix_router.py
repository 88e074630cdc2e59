"""Serve's side of `routing.py`: the request router of an engine's deployment, in the process of the ingress.

    Serve --choose_replicas(request)--> routing.rank --> replicas in groups --> Serve takes the first that accepts
          --on_send_request, on_request_completed, on_request_routed--> Ledger: load and prompts of each replica
          --on_new_queue_len_info--> it gave a sign       --update_replicas, on_replica_actor_died--> which there are

Ray Serve LLM's PrefixCacheAffinityRouter keeps its tree in an actor of its own, which it asks three times per request
with a blocking `ray.get` on the loop that routes everything: with the actor on a machine that has lost its power all
requests would hang. It also fails for an empty prompt, evicts nothing by default, and reads `request.prompt`, where
ours has the keys of one. A table in each ingress's memory, of which it tells the others (ledger.py), knows as much.

Serve pickles this module's classes by value: whatever is compared by identity elsewhere must not be defined here.
"""

import asyncio
import contextlib
from random import Random
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

from pomarium.cluster.endpoint import ledger
from pomarium.cluster.endpoint.ledger import SILENT_NO_MORE_S, SILENT_S, Entry, What
from pomarium.cluster.endpoint.routing import NoReplicaError, rank

FIRST_NEWS_S = 2.0
"""How long the first request waits for the controller to say which replicas there are."""


class PrefixRouter(RequestRouter):
    """Prefix affinity, balanced by load; refuses at once while there is no replica, where Serve's own would wait, and
    waits like that one for a model that may sleep."""

    queue_len_response_deadline_s = 0.5
    _holds = False

    def initialize_state(self, holds: bool = False) -> None:
        """Serve's way to hand in `request_router_kwargs`.

        Args:
            holds: requests wait while there is no replica, which is how Serve learns to start one.
        """
        self._holds = holds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = ledger.of_this_process()
        self._model = self._deployment_id.name
        self._told = asyncio.Event()
        self._random = Random()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's question; see `routing.rank`."""
        keys = self._keys(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        named = {replica.replica_id.unique_id: replica.replica_id for replica in candidate_replicas}
        for name, replica_id in named.items():
            waited = self._ledger.unanswered_s(self._model, name)
            if waited > SILENT_S:
                self.on_replica_actor_unavailable(replica_id)  # Serve then asks it before it sends it anything
            if waited > SILENT_NO_MORE_S:
                self._ledger.answered(self._model, name)  # else it would be asked for ever and sent nothing
        groups = rank(self._ledger.candidates(self._model, named, keys), len(keys), self._random)
        return [[self._replicas[named[name]] for name in group if named[name] in self._replicas] for group in groups]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Serve's way in. Raises NoReplicaError while there is none, unless it holds."""
        if self._holds:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        if not self._told.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), FIRST_NEWS_S)
        if not self._replicas:
            raise NoReplicaError(self._deployment_id.name)
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """These are the replicas now."""
        super().update_replicas(replicas)
        self._ledger.keep(self._model, {name.unique_id for name in self._replica_id_set})
        self._told.set()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found it dead, before the controller did."""
        super().on_replica_actor_died(replica_id)
        self._ledger.keep(self._model, {name.unique_id for name in self._replica_id_set})

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """A request leaves for it."""
        super().on_send_request(replica_id)
        self._write(What.SENT, replica_id)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """It has taken or rejected a request."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._ledger.answered(self._model, replica_id.unique_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """It has taken this request."""
        if keys := self._keys(pending_request):
            self._write(What.READ, replica_id, keys)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request that it was sent has ended, one way or another."""
        self._write(What.OVER, replica_id)

    def _write(self, what: What, replica_id: ReplicaID, keys: tuple[int, ...] = ()) -> None:
        self._ledger.write(Entry(what, self._model, replica_id.unique_id, keys))

    def _keys(self, request: PendingRequest | None) -> tuple[int, ...]:
        """Of a call of `EngineReplica.request`: (Routing, ReplyTo). None of its other methods has a prompt."""
        if request is None or request.metadata.call_method != "request":
            return ()
        keys: tuple[int, ...] = request.args[0].keys
        return keys
