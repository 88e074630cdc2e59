"""What an agent asks Ray's head (agent.Head), through a client that is made anew when the head was away.

Import this module after `Membership.variables()` is in os.environ: Ray reads its token when it is imported.
"""

from ray._private.ray_constants import KV_NAMESPACE_SESSION
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError, RpcError

from pomarium.cluster.node import ray_address
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.starting import Say
from pomarium.cluster.rack import drains, power_states, reports, roster
from pomarium.cluster.rack.mac_power import MacPower
from pomarium.worker import local_network
from pomarium.worker.errors import PomariumError

FAULTS = (RayError, RpcError, OSError, RuntimeError, ValueError, TypeError, KeyError)
"""No answer, or one that is not understood."""


class HeadView:
    """See agent.Head. say: is told why the head does not answer, once for each reason."""

    def __init__(self, membership: Membership, say: Say) -> None:
        self._membership, self._say = membership, say
        self._client: GcsClient | None = None
        self._told = ""

    def answers(self) -> bool:
        """Whether something listens at the head's address."""
        address = self._membership.address
        fault = ray_address.fault(address)
        told = "" if fault is None else local_network.explained(local_network.reason(fault), address)
        if told and told != self._told:
            self._say(f"the rack's head at {address} does not answer: {told}")
        self._told = told
        if fault is not None:
            self._client = None
        return fault is None

    def session(self) -> str:
        """Raises PomariumError."""
        try:
            found = self._connected().internal_kv_get(b"session_name", KV_NAMESPACE_SESSION, timeout=roster.TIMEOUT_S)
        except FAULTS as error:
            raise self._lost(error) from error
        return "" if found is None else str(found.decode())

    def told(self, name: str) -> MacPower | None:
        """Raises PomariumError."""
        try:
            self._connected()
            return power_states.read(name)
        except FAULTS as error:
            raise self._lost(error) from error

    def instance(self, name: str) -> str | None:
        """Raises PomariumError."""
        try:
            return power_states.instance_of(name, roster.read(self._connected()))
        except FAULTS as error:
            raise self._lost(error) from error

    def drained(self, instance: str) -> bool:
        """Raises PomariumError."""
        try:
            nodes = self._connected().get_all_node_info(timeout=roster.TIMEOUT_S)
        except FAULTS as error:
            raise self._lost(error) from error
        ends = [found.death_info for found in nodes.values() if found.instance_id == instance and _dead(found)]
        return any(end.reason == end.AUTOSCALER_DRAIN_IDLE for end in ends)

    def let_go(self, name: str) -> bool:
        """Raises PomariumError."""
        try:
            last = next((member for member in roster.read(self._connected()) if member.name == name), None)
            drain = drains.read(name)
        except FAULTS as error:
            raise self._lost(error) from error
        return last is not None and last.drained and drain is not None and drain.node == last.node

    def _connected(self) -> GcsClient:
        if self._client is None:
            self._client = roster.connect(self._membership)
            reports.use(self._client)
        return self._client

    def _lost(self, error: Exception) -> PomariumError:
        self._client = None
        return PomariumError(str(error).strip().partition("\n")[0][:200])


def _dead(found: GcsNodeInfo) -> bool:
    return bool(found.state == GcsNodeInfo.DEAD)
