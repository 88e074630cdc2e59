"""The rack that this machine is part of, as recorded by `pomarium rack up` and `join` until `down`.

    up, join --save--> rack.json --current--> CurrentRack --enter--> os.environ of a driver, before it imports Ray

The record holds the rack's token, so only its owner may read it. It outlives a reboot; what it names does not, and then
`current` sees no rack.
"""

import json
import os
import tempfile
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pomarium.cluster.machine.state import made, state_folder, unwritable
from pomarium.cluster.node import ray_node
from pomarium.cluster.node.direct import straight
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_node import NodeSpec, Ports
from pomarium.worker.address import host_of, http_url
from pomarium.worker.errors import SettingsError

RECORD = "rack.json"
NO_RACK = "No rack is up on this machine: start one with `pomarium rack up`, or join one with `pomarium rack join`."


@dataclass(frozen=True)
class Network:
    """Linux network namespaces of simulated Macs: the bridge that joins them, and their names."""

    bridge: str
    namespaces: tuple[str, ...]


@dataclass(frozen=True)
class CurrentRack:
    """What this machine runs for a rack.

    Attributes:
        membership: address of Ray's head, token, TLS folder or None.
        nodes: of this machine; the first is the one that drivers on this machine connect to.
        folder: temporary files of all nodes.
        simulated: the nodes are "Macs" of one machine.
        network: what was set up for them.
        wake_port: that simulated Macs which sleep listen on for magic packets; None: none sleeps.
    """

    membership: Membership
    nodes: tuple[NodeSpec, ...]
    folder: Path
    simulated: bool = False
    network: Network | None = None
    wake_port: int | None = None

    @property
    def address(self) -> str:
        """HOST:PORT of Ray's head."""
        return self.membership.address

    @property
    def token(self) -> str:
        """Ray's."""
        return self.membership.token

    @property
    def tls(self) -> Path | None:
        """Folder of this machine's certificate."""
        return self.membership.tls


def current(environ: Mapping[str, str] = os.environ) -> CurrentRack | None:
    """The rack that is up on this machine; None if there is none, or its first node is gone. Raises SettingsError."""
    rack = recorded(environ)
    if rack is None or not ray_node.runs(rack.nodes[0], rack.membership.session):
        return None
    return rack


def recorded(environ: Mapping[str, str]) -> CurrentRack | None:
    """As `current`, whether its processes live or not: `down` and the next `up` clear up after them."""
    path = state_folder(environ) / RECORD
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read(path: Path) -> CurrentRack:
    """The record in `path`. Raises SettingsError, FileNotFoundError, NotADirectoryError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise SettingsError(f"The record of this machine's rack, {path}, cannot be read: {error.strerror}.") from error
    try:
        return _rack(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"The record of this machine's rack, {path}, is damaged ({error!r}): restart the machine and delete "
            "the file."
        ) from error


def save(rack: CurrentRack, environ: Mapping[str, str]) -> None:
    """Record `rack` as this machine's, whole or not at all. Raises SettingsError if that cannot be."""
    path = made(state_folder(environ)) / RECORD
    try:
        write(rack, path)
    except OSError as error:
        raise unwritable(path, error) from error


def write(rack: CurrentRack, path: Path) -> None:
    """As `save`, to `path`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(rack), file, default=str, indent=1)
    Path(temporary).replace(path)


def forget(environ: Mapping[str, str]) -> None:
    """This machine is part of no rack."""
    with suppress(NotADirectoryError):
        (state_folder(environ) / RECORD).unlink(missing_ok=True)


def enter(environ: MutableMapping[str, str] = os.environ) -> CurrentRack | None:
    """Make a driver of this process: `environ` gets what connects it to the rack that is up on this machine, if any.

    Raises SettingsError.
    """
    rack = current(environ)
    if rack is not None:
        environ.update(environment(rack) | straight(environ))
    return rack


def environment(rack: CurrentRack) -> dict[str, str]:
    """What a driver on this machine needs in os.environ before Ray is imported."""
    return rack.membership.variables() | {"RAY_ADDRESS": rack.address}


def for_ray_commands(rack: CurrentRack, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Ray's own commands (`ray status`, `ray job submit`, `serve deploy`) need on this machine, where those that
    speak HTTP would ask the proxy that `environ` names.

    Of the last two each has a variable of its own for the same address (ray/dashboard/modules/job/cli.py,
    ray/serve/scripts.py). `ray status` reads what an autoscaler of the old kind would write, unless it is told that
    there is one of the new: then it asks the head itself, which knows its nodes with and without an autoscaler.
    """
    host = host_of(rack.address)
    jobs = http_url(host, ray_node.JOBS_PORT)
    return (
        environment(rack)
        | straight(environ, host)
        | {"RAY_API_SERVER_ADDRESS": jobs, "RAY_DASHBOARD_ADDRESS": jobs, "RAY_enable_autoscaler_v2": "1"}
    )


def _rack(data: dict[str, Any]) -> CurrentRack:
    membership, network = data["membership"], data["network"]
    tls = membership.pop("tls")
    return CurrentRack(
        Membership(**membership, tls=None if tls is None else Path(tls)),
        tuple(_node(one) for one in data["nodes"]),
        Path(data["folder"]),
        bool(data["simulated"]),
        None if network is None else Network(network["bridge"], tuple(network["namespaces"])),
        data.get("wake_port"),
    )


def _node(data: dict[str, Any]) -> NodeSpec:
    """What another version wrote beside is dropped, and what it did not know is as by default: `rack down` after an
    upgrade ends what the older one started."""
    data = _known(NodeSpec, data)
    ports = Ports(**_known(Ports, data.pop("ports")))
    folder, cores = Path(data.pop("folder")), tuple(data.pop("cores"))
    autoscaling = data.pop("autoscaling", None)
    return NodeSpec(
        **data,
        folder=folder,
        cores=cores,
        ports=ports,
        autoscaling=None if autoscaling is None else Path(autoscaling),
    )


def _known(kind: type[NodeSpec] | type[Ports], data: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in data.items() if name in names}
