"""The engine's connection to Ray: the one it finds itself in, the one that RAY_ADDRESS names, or an embedded one.

An embedded Ray lives and dies with this process. It listens on loopback only and, because other users of the machine
reach loopback too, asks for a token; children inherit both through the environment.
"""

import logging
import os
import secrets

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from pomarium.cluster.node import ray_address
from pomarium.cluster.node.membership import SAME_PYTHON
from pomarium.cluster.node.worker_environment import RESOURCE

logger = logging.getLogger("vllm.pomarium.executor")  # see `launch`

_OBJECT_STORE_BYTES = 256 << 20
"""Calls go over wires, not through Ray's object store; Ray's default would reserve 30% of the memory."""


def ensure_connected(num_workers: int = 1) -> None:
    """Connect this process to a Ray unless it is connected; one of its own gets room for `num_workers`.

    Raises:
        SettingsError, ConnectionError: RAY_ADDRESS does not answer.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        ray_address.require(address)
        os.environ.update(SAME_PYTHON)
        ray.init(address=address, logging_level="WARNING")
        return
    start_embedded(num_workers)


def start_embedded(num_workers: int = 1) -> None:
    """Start a Ray of this process' own, with room for `num_workers` workers."""
    prepare_environment()
    logger.info("Starting an embedded Ray on this machine (set RAY_ADDRESS to join a running one).")
    ray.init(
        address="local",
        resources={RESOURCE: num_workers},
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level="WARNING",
        # Ray would run workers at nice 15: behind the engine that waits for them.
        _system_config={"worker_niceness": 0},
    )


def prepare_environment() -> None:
    """Make an embedded Ray listen on loopback only and ask for a token, here and in child processes.

    An authentication that the user chose (RAY_AUTH_MODE) stays. Ray reads all of this when it is imported, which may
    have happened, so what it read is set too.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # decides whether node addresses, and so all listeners, are loopback
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
