"""Ray's autoscaler asks for nodes here: its NodeProvider, over the keeper of our Macs.

    Ray's autoscaler (v2, in the head's monitor process) --create, terminate--> RackNodeProvider --> keeper.py
                                                         <--non_terminated_nodes--

The interface is that of Ray's external providers (ray/autoscaler/node_provider.py), which v2 wraps
(autoscaler/v2/instance_manager/node_provider.py). What v2 relies on: a node is known by its instance, which its Ray
node tells in RAY_CLOUD_INSTANCE_ID and which is new at each wake; a Mac that does not wake drops out of the list, and
is asked for again if its demand is still there; one that cannot be asked now raises NodeLaunchException.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)
from ray.exceptions import RayError, RpcError

from pomarium.cluster.autoscaling.fleet import FleetMac
from pomarium.cluster.autoscaling.keeper import Keeper, KnownMac, RefusedError
from pomarium.cluster.autoscaling.policy import WakePolicy
from pomarium.cluster.autoscaling.ray_config import HEAD_TYPE, Fleet
from pomarium.cluster.autoscaling.transport import Transport, transport_of
from pomarium.cluster.rack import power_states, reports, roster
from pomarium.cluster.rack.inventory import Inventory, MacEntry
from pomarium.cluster.rack.mac_power import MacPower, Power, mac_of
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)


class Head:
    """Ray's head, asked through one client. See keeper.Rack."""

    def __init__(self, address: str) -> None:
        self._client = GcsClient(address=address)
        reports.use(self._client)

    def instances(self) -> Mapping[str, str]:
        """Instance of each live Mac by name."""
        return {member.name: member.instance for member in roster.read(self._client) if member.alive and member.facts}

    def publish(self, macs: Sequence[MacPower]) -> None:
        """Tell what the Macs do."""
        try:
            power_states.publish(macs)
        except (RayError, RpcError, RuntimeError) as error:
            raise PomariumError(f"what the Macs do could not be told: {error}") from error


class RackNodeProvider(NodeProvider):
    """`provider` in what ray_config.py writes."""

    def __init__(self, provider_config: Mapping[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        inventory = Inventory.model_validate(provider_config["inventory"])
        head, address = provider_config["head"], provider_config["address"]
        fleet = Fleet(
            inventory, head["name"], head["instance"], address, provider_config["version"], provider_config["record"]
        )
        labels = fleet.labels
        known = {
            entry.name: KnownMac(
                entry.address,
                labels[entry.name],
                _transport(entry, address, inventory),
                entry.name in fleet.kept_awake,
            )
            for entry in inventory.macs
            if entry.name in labels
        }
        self._head_instance, self._head_ip = head["instance"], address.rpartition(":")[0]
        self._tags: dict[str, dict[str, str]] = {}
        self._addresses = {name: mac.address for name, mac in known.items()}
        sleep = inventory.sleep
        policy = WakePolicy(sleep.wake_deadline)
        self._keeper = Keeper(known, Head(address), Path(fleet.record), sleep.quiet_hours, policy)
        # It would say twice a second that it drops empty fields of the file, which Ray has added itself.
        logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
        self._keeper.start()

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Instances: the head's, and of Macs that are awake, wake, or are about to sleep.

        As of now: Ray has read its nodes before it asks, and takes one that is missing here for ended.
        """
        self._keeper.heard()
        try:
            self._keeper.tick()
        except (PomariumError, OSError) as error:
            logger.warning("%s", error)
        found = [self._head_instance, *(mac.instance for mac in self._here() if mac.instance)]
        return [node for node in found if tag_filters.items() <= self.node_tags(node).items()]

    def is_running(self, node_id: str) -> bool:
        """Whether its Mac is awake."""
        mac = self._mac(node_id)
        return node_id == self._head_instance or (mac is not None and mac.state is not Power.WAKING)

    def is_terminated(self, node_id: str) -> bool:
        """Whether the instance is over."""
        return node_id != self._head_instance and self._mac(node_id) is None

    def node_tags(self, node_id: str) -> dict[str, str]:
        """What Ray gave with `create`, or for a Mac that came by itself what it would have given."""
        if node_id == self._head_instance:
            return {
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_NODE_NAME: HEAD_TYPE,
                TAG_RAY_USER_NODE_TYPE: HEAD_TYPE,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
        name = mac_of(node_id)
        own = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: name, TAG_RAY_USER_NODE_TYPE: name}
        return own | {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE} | self._tags.get(node_id, {})

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        """Remember them for as long as this process lives."""
        self._tags.setdefault(node_id, {}).update(tags)

    def external_ip(self, node_id: str) -> str:
        """As rack.yaml has it."""
        return self._head_ip if node_id == self._head_instance else self._addresses[mac_of(node_id)]

    internal_ip = external_ip

    def create_node(self, node_config: Mapping[str, Any], tags: Mapping[str, str], count: int) -> None:
        """Of Ray's older interface, which v2 does not call."""
        self.create_node_with_resources_and_labels(node_config, tags, count, {}, {})

    def create_node_with_resources_and_labels(
        self,
        node_config: Mapping[str, Any],
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        """Begin to wake the Mac that the node type names. Raises NodeLaunchException."""
        name = tags[TAG_RAY_USER_NODE_TYPE]
        try:
            instance = self._keeper.ask(name)
        except RefusedError as refused:
            raise NodeLaunchException("NotWoken", str(refused), sys.exc_info()) from refused
        self.set_node_tags(instance, tags)

    def terminate_node(self, node_id: str) -> None:
        """Put its Mac to sleep."""
        self._keeper.retire(node_id)
        self._tags = {node: tags for node, tags in self._tags.items() if self._mac(node) is not None}

    def _here(self) -> list[FleetMac]:
        return [mac for mac in self._keeper.macs() if mac.state is not Power.ASLEEP]

    def _mac(self, node_id: str) -> FleetMac | None:
        return next((mac for mac in self._here() if mac.instance == node_id), None)


def _transport(entry: MacEntry, head: str, inventory: Inventory) -> Transport | None:
    try:
        return transport_of(entry, head, inventory.sleep.wake_port)
    except PomariumError as missing:
        logger.warning("%s", missing)
        return None
