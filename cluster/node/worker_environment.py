"""Environment of a worker process: the engine's own settings, and the devices that the executor chose.

    variables --parted--> what Ray may set (runtime_env), Secrets --argument of the actor--> enter(os.environ) there

Machine-specific variables (paths, addresses, thread counts) stay behind: a worker's machine has its own. Ray shows a
runtime environment to whoever can read: in runtime_env_agent.log, on the command line of the process that sets it, and
in Serve's status. An argument travels over Ray's authenticated calls and is written nowhere.
"""

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from pomarium.worker.command_buffers import is_default
from pomarium.worker.handoff.credentials import PLAINTEXT_VARIABLE, TLS_VARIABLE
from pomarium.worker.settings import MACHINE_MEMORY

VISIBLE_DEVICES = "VLLM_METAL_VISIBLE_DEVICES"
RESOURCE = "mlx"
"""Ray's custom resource: one per Mac, or per device that may run a worker."""

HANDED_OVER = "POMARIUM_WORKERS"
"""Worker processes that were started ahead of the engine: see `handover`."""

_CARRIED_PREFIXES = (
    "VLLM_",
    "POMARIUM_",
    "MLX_",
    "HF_",
    "HUGGING_FACE_",
    "MODELSCOPE_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "OPENBLAS_",
)
_CARRIED_NAMES = frozenset({"PYTHONPATH", "PYTHONHASHSEED", "LD_PRELOAD"})
NODE_OWN = frozenset({TLS_VARIABLE, PLAINTEXT_VARIABLE, MACHINE_MEMORY, "POMARIUM_RACK_KEY", "POMARIUM_SESSION"})
"""What a rack's node gives its processes: never another machine's."""
ENDPOINT_OWN = frozenset({"POMARIUM_API_KEY"})
"""What only the endpoint's ingress needs, which gets it otherwise."""
_LEFT_BEHIND = NODE_OWN | ENDPOINT_OWN | {
    VISIBLE_DEVICES, HANDED_OVER, "VLLM_HOST_IP", "VLLM_PORT", "VLLM_WORKER_MULTIPROC_METHOD",
}  # fmt: skip

_SECRET_ENDINGS = ("_TOKEN", "_KEY", "_SECRET", "_PASSWORD")
"""HF_TOKEN, HUGGING_FACE_HUB_TOKEN, MODELSCOPE_API_TOKEN, VLLM_API_KEY, and whatever is named after them."""


@dataclass(frozen=True)
class Secrets:
    """Environment variables that no log and no process list may show; neither does `repr`."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)

    def enter(self, environ: MutableMapping[str, str]) -> None:
        """Set them, in a process that is to read them: before what reads them is imported."""
        environ.update(self.values)


def parted(variables: Mapping[str, str]) -> tuple[dict[str, str], Secrets]:
    """(what anybody may read, what nobody may)."""
    secret = {name: value for name, value in variables.items() if name.upper().endswith(_SECRET_ENDINGS)}
    return {name: value for name, value in variables.items() if name not in secret}, Secrets(secret)


def local_ranks(node_ids: Sequence[str]) -> tuple[int, ...]:
    """Index of each worker among those on its node, in rank order; it is also the index of its device."""
    seen: Counter[str] = Counter()
    ranks = []
    for node_id in node_ids:
        ranks.append(seen[node_id])
        seen[node_id] += 1
    return tuple(ranks)


def worker_environment(engine: Mapping[str, str], device: int) -> dict[str, str]:
    """Variables to set in a worker's process before it starts.

    Args:
        engine: the environment of the engine's process.
        device: index of the worker's device on its node.
    """
    carried = {
        name: value
        for name, value in engine.items()
        if name not in _LEFT_BEHIND
        and not is_default(name, value)
        and (name in _CARRIED_NAMES or name.startswith(_CARRIED_PREFIXES))
    }
    return carried | {VISIBLE_DEVICES: str(device)}


def override_warning(engine: Mapping[str, str], devices: Sequence[int]) -> str | None:
    """What to tell a user who set the devices by hand, None if he did not."""
    chosen = ",".join(map(str, devices))
    value = engine.get(VISIBLE_DEVICES)
    if value is None or value == chosen:
        return None
    return f"{VISIBLE_DEVICES}={value} is overridden: the executor gives each worker its device ({chosen})."
