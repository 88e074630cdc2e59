"""One Ray node of this machine: its facts, and its command line, environment and processes as functions of these.

NodeSpec, Membership --command, environment--> `ray start` (starting.py)
                     --kin_of--> Kin: all processes of the node, to be ended or signalled together (kin.py)
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pomarium.cluster.node import kin
from pomarium.cluster.node.direct import straight
from pomarium.cluster.node.kin import Kin
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.worker_environment import NODE_OWN, RESOURCE
from pomarium.worker.settings import MACHINE_MEMORY

MARKER = "_POMARIUM_NODE"
"""SESSION/NAME. The underscore keeps it out of what engines hand on to workers on other nodes (POMARIUM_*)."""
MAC_SUFFIX = ".mac"
"""Of the marker and folder of a simulated Mac that sleeps."""
START_HOOK = "pomarium.cluster.node.start_hook.without_ray_client"

OBJECT_STORE_BYTES = 128 << 20
"""Tensors go over gRPC, so little lies in Ray's object store."""

GCS_PORT = 6379
"""Ray's head. The same default as in rack.yaml."""

JOBS_PORT = 8265
"""Of the head, for `ray job submit` and `pomarium batch submit`. Ray's own default."""

OWN_SYSTEM_CONFIG: Mapping[str, int] = {
    # Ray would run workers at nice 15: behind the engine that waits for them.
    "worker_niceness": 0,
    # Ray would kill a worker when the machine's memory runs low, the largest first: the one that serves.
    "memory_monitor_refresh_ms": 0,
}
"""Ray's own settings (src/ray/common/ray_config_def.h) for any Ray of ours, a single machine's too."""

SYSTEM_CONFIG: Mapping[str, int] = {
    **OWN_SYSTEM_CONFIG,
    # A node that does not answer is dead after 500 ms + 5 x 1 s and the pauses between: 8 s at most instead of 67.
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}
"""Those of a rack; the head hands them to all nodes."""

MOST_STARTS = 1000
"""Failed starts in a row after which Serve gives an endpoint up: in effect never. A controller that took the place of a
lost one does not know that the endpoint was up before."""
SERVE_VARIABLES: Mapping[str, str] = {
    # The controller knows a bound of its own per replica, too.
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": str(MOST_STARTS),
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "pomarium.cluster.endpoint.pacing:install",
}
"""For the environment of Serve's controller."""

AUTOSCALER: Mapping[str, str] = {
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",  # instead of 5: it is a part of what the first request waits
}
"""Of the head's processes, for the autoscaler among them."""

_LEFT_OUT = NODE_OWN | {"RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "PYTHONDONTWRITEBYTECODE"}
_LEFT_OUT |= {"RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"}
"""Of whoever starts a node: what would contradict the node's own, and what makes every start compile all of Ray."""


@dataclass(frozen=True)
class Ports:
    """What a node listens on, for a firewall. The handoff and control ports of workers are the system's choice."""

    object_manager: int = 6381
    runtime_env: int = 6382
    agent_grpc: int = 6383
    agent_http: int = 6384
    metrics: int = 6385
    first_worker: int = 10002
    last_worker: int = 10999


@dataclass(frozen=True)
class NodeSpec:
    """A node of this machine.

    Attributes:
        name: within the rack; what its marker ends with.
        address: its own IP address.
        folder: of its sockets and logs; its own.
        head: Ray's head runs here, on the port that the membership's address names.
        worker: it runs workers.
        labels: of rack.labels; empty without a worker.
        cpus: logical ones; None counts the machine's.
        memory: bytes that its workers may take for the machine's memory; None for no limit.
        cores: it is held to these; empty for no limit.
        namespace: Linux network namespace that it lives in.
        ports: several nodes of one machine need different ones, for Ray listens on all addresses with some.
        logs: what workers print reaches drivers.
        instance: its name for Ray's autoscaler, new at each start; "" for a node that is none of the autoscaler's.
        autoscaling: what the head's autoscaler reads (autoscaling/ray_config.py); None for none.
        keeps: the head's state is on disk, and its process is started again when it ends alone (head_keeper.py).
    """

    name: str
    address: str
    folder: Path
    head: bool = False
    worker: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    cpus: int | None = None
    memory: int | None = None
    cores: tuple[int, ...] = ()
    namespace: str | None = None
    ports: Ports = Ports()
    logs: bool = True
    instance: str = ""
    autoscaling: Path | None = None
    keeps: bool = False


def marker(session: str, name: str) -> str:
    """Value of MARKER in all processes of a node."""
    return f"{session}/{name}"


def command(spec: NodeSpec, membership: Membership, python: str = sys.executable) -> list[str]:
    """The command line that starts the node and ends when it is up."""
    inside = ["ip", "netns", "exec", spec.namespace] if spec.namespace else []
    held = ["taskset", "-c", ",".join(map(str, spec.cores))] if spec.cores else []
    options = [
        f"--node-ip-address={spec.address}",
        f"--node-name={spec.name}",
        f"--temp-dir={spec.folder}",
        f"--resources={json.dumps({RESOURCE: 1} if spec.worker else {})}",
        f"--labels={','.join(f'{key}={value}' for key, value in spec.labels.items())}",
        "--num-gpus=0",  # Ray would offer an Apple GPU as GPU: 1
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]
    if spec.cpus is not None:
        options.append(f"--num-cpus={spec.cpus}")
    if spec.head:
        options += [
            "--head",
            f"--port={membership.address.rpartition(':')[2]}",
            "--include-dashboard=true",  # takes jobs, from whoever has the token
            f"--dashboard-host={spec.address}",
            f"--dashboard-port={JOBS_PORT}",
            "--no-monitor" if spec.autoscaling is None else f"--autoscaling-config={spec.autoscaling}",
            f"--system-config={json.dumps({**SYSTEM_CONFIG, **_kept(spec)})}",
        ]
    else:
        options.append(f"--address={membership.address}")
    if not spec.logs:
        options.append("--include-log-monitor=false")
    options += _port_options(spec.ports)
    return [*inside, *held, python, "-m", "ray.scripts.scripts", "start", *options]


def _kept(spec: NodeSpec) -> dict[str, str]:
    return {"gcs_storage": "rocksdb", "gcs_storage_path": str(spec.folder / "head")} if spec.keeps else {}


def _port_options(ports: Ports) -> list[str]:
    return [
        # Of the system's choice, another at each start. A Mac that was lost and joins again at its old address and port
        # is one that others' gRPC has stopped to try, for up to two minutes: the head took it for dead within 3 s.
        "--node-manager-port=0",
        f"--object-manager-port={ports.object_manager}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--dashboard-agent-listen-port={ports.agent_http}",
        f"--metrics-export-port={ports.metrics}",
        f"--min-worker-port={ports.first_worker}",
        f"--max-worker-port={ports.last_worker}",
    ]


def environment(spec: NodeSpec, membership: Membership, base: Mapping[str, str]) -> dict[str, str]:
    """Variables of the node's processes, workers and engines among them."""
    kept = {name: value for name, value in base.items() if name not in _LEFT_OUT}
    own = {
        **SERVE_VARIABLES,
        MARKER: marker(membership.session, spec.name),
        "RAY_START_HOOK": START_HOOK,
        # `python` in a job's command line is the rack's.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
    }
    if spec.instance:
        own |= {"RAY_CLOUD_INSTANCE_ID": spec.instance, "RAY_NODE_TYPE_NAME": "head" if spec.head else spec.name}
    if spec.autoscaling is not None:
        own |= AUTOSCALER
    if spec.memory is not None:
        own[MACHINE_MEMORY] = str(spec.memory)
    return kept | straight(base) | membership.variables() | own


def kin_of(spec: NodeSpec, session: str) -> Kin:
    """How the node's processes are found."""
    return Kin(MARKER, marker(session, spec.name), spec.folder)


def mac_kin_of(spec: NodeSpec, session: str) -> Kin:
    """How the process is found that is a simulated Mac while it sleeps, and its agent later."""
    folder = spec.folder.with_name(f"{spec.folder.name}{MAC_SUFFIX}")
    return Kin(MARKER, f"{marker(session, spec.name)}{MAC_SUFFIX}", folder)


def runs(spec: NodeSpec, session: str) -> bool:
    """Whether the node's raylet lives."""
    return any(name == "raylet" for name in kin.names(kin_of(spec, session)))


def heads(spec: NodeSpec, session: str) -> bool:
    """Whether the node has what is to be the rack's head: its GCS lives, or none belongs there."""
    return not spec.head or any(name.startswith("gcs_server") for name in kin.names(kin_of(spec, session)))
