"""How much memory the KV cache of one worker gets.

    snapshot() at start ---+
    snapshot() now --------+--others_since--+
    memory_base(device) --------------------+--> MemoryFacts --kv_bytes--> bytes, a whole number of blocks
    Settings, model ------------------------+

`kv_bytes` and the functions around it decide and touch nothing; `snapshot` and `memory_base` read.
All sizes are bytes. A rack may say that this machine has less memory than it has (POMARIUM_MACHINE_MEMORY).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import psutil

from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.errors import InsufficientMemoryError, SettingsError
from pomarium.worker.settings import AUTO_FRACTION, MACHINE_MEMORY, DeviceKind

GIB = 1 << 30
CPU_AUTO_KV_BYTES = 2 * GIB
"""What the KV caches of a machine's CPU workers take together unless the user gives a fraction: 46,000 tokens of
SmolLM2. The pool is zeroed at start, which on a virtual machine takes about a second per GiB, and up to five."""
CPU_MOST_AUTO_KV_BYTES = 4 * GIB
"""What they take together at most if a sequence of maximum length needs more than that."""
SYSTEM_SHARE, MOST_SYSTEM_BYTES = 16, 4 * GIB
"""A sixteenth of the machine's memory, at most 4 GiB, stays free when a pool is made: a system that has none left
compresses and swaps before it refuses anything. What runs by then is not in it, for that is not available."""
OWN_BYTES = GIB // 4
"""What our processes on the machine may grow by while they serve: requests, tokenizers, bodies (an upload: 200 MiB)."""
MIXED_PADDING = 2
"""vLLM puts layers of one kind into groups of as many layers each (vllm/v1/core/kv_cache_utils.py), and a group that is
not full takes as many blocks: less than twice what its layers need."""
RESERVED_BLOCKS = 1
"""vLLM's block pool keeps one block as a placeholder (vllm/v1/core/block_pool.py, null_block): no sequence gets it."""


@dataclass(frozen=True)
class MemoryFacts:
    """What decides the size of a KV cache.

    Attributes:
        base: the memory of which the fraction is taken: the recommended working set of a GPU, else the memory size.
        available: what the machine can still give without swapping, this worker's weights already taken off.
        reserve: the part of it that stays free.
        others: what other processes took since this worker started.
        weights: of the loaded model, or of this worker's stage.
        activations: headroom for the largest step.
        workers: how many share this machine, this one included.
        fraction: the user's, in (0, 1]; None is `auto`.
        sequence: K and V, and states, of one sequence of maximum length, the step that is computed included.
        sequences: that are served at once (max_num_seqs).
        block: K and V of one block over all layers of this worker.
        mixed: layers are of several kinds (windows, states, heads of two sizes).
        stage: the worker has a part of a model's layers, which a plan gave to this machine.
    """

    kind: DeviceKind
    base: int
    available: int
    reserve: int
    others: int
    weights: int
    activations: int
    workers: int
    fraction: float | None
    paged: bool
    sequence: int
    sequences: int
    block: int
    mixed: bool = False
    stage: bool = False


def share(facts: MemoryFacts) -> int:
    """All that this worker may take: its part of the fraction, less what others took since it started.

    Without paging there is no fraction and the part of the whole base is the bound.
    """
    fraction = (AUTO_FRACTION if facts.fraction is None else facts.fraction) if facts.paged else 1.0
    return max(0, int(facts.base * fraction) // facts.workers - facts.others)


def minimum_kv_bytes(facts: MemoryFacts) -> int:
    """The least that serves one sequence of maximum length, in whole blocks."""
    return _blocks_for(facts, 1)


def maximum_kv_bytes(facts: MemoryFacts) -> int:
    """The most that the sequences served at once can use, in whole blocks: more would only keep old prefixes."""
    return _blocks_for(facts, facts.sequences * (MIXED_PADDING if facts.mixed else 1))


def _blocks_for(facts: MemoryFacts, sequences: int) -> int:
    return (sequences * -(-facts.sequence // facts.block) + RESERVED_BLOCKS) * facts.block


def spare(facts: MemoryFacts) -> int:
    """What this worker may still take of the memory that is available now: its part, less the reserve's."""
    return max(0, facts.available - facts.reserve) // facts.workers


def kv_bytes(facts: MemoryFacts) -> int:
    """Bytes for the KV cache, a multiple of `facts.block`; without paging the minimum.

    The least of: what the share leaves; what is available now, less the reserve; what the sequences served at once can
    use. On the CPU, where the whole memory is the base, the machine's workers stay together within 2 GiB under `auto`,
    or up to 4 GiB if a sequence of maximum length needs them.
    Raises InsufficientMemoryError if one sequence of maximum length does not fit.
    """
    room = _room(facts)
    least = minimum_kv_bytes(facts)
    if room < least:
        raise InsufficientMemoryError(_refusal(facts, room, least))
    return min(room // facts.block * facts.block, maximum_kv_bytes(facts)) if facts.paged else least


def cache_bytes(facts: MemoryFacts, asked: int | None) -> int:
    """`kv_bytes`, or what --kv-cache-memory-bytes asked for.

    Raises InsufficientMemoryError as `kv_bytes`, and if less was asked for than one sequence needs.
    """
    if asked is None:
        return kv_bytes(facts)
    if asked < (least := minimum_kv_bytes(facts)):
        raise InsufficientMemoryError(
            f"--kv-cache-memory-bytes {asked} is less than one sequence of maximum length needs ({least}): raise it or "
            "lower --max-model-len."
        )
    return asked


def _room(facts: MemoryFacts) -> int:
    """What is left for K and V; negative if weights and activations alone do not fit."""
    room = min(share(facts) - facts.weights, spare(facts)) - facts.activations
    if facts.kind is DeviceKind.CPU and facts.paged and facts.fraction is None:
        together = min(max(CPU_AUTO_KV_BYTES, minimum_kv_bytes(facts) * facts.workers), CPU_MOST_AUTO_KV_BYTES)
        room = min(room, together // facts.workers)
    return room


def _refusal(facts: MemoryFacts, room: int, least: int) -> str:
    """The sentence that says how much is missing and what to change."""
    if room < 0:
        what = (
            f"The weights ({_size(facts.weights)}) and activations ({_size(facts.activations)}) "
            "leave no memory for the KV cache"
        )
        cures = ["serve a smaller or more strongly quantised model"]
    else:
        what = f"One sequence of maximum length needs {_size(least)} of KV cache and this worker has {_size(room)}"
        cures = ["lower --max-model-len"]
    if facts.paged and _room(replace(facts, fraction=1.0)) > room:
        cures.append("set VLLM_METAL_MEMORY_FRACTION higher")
    if facts.workers > 1:
        cures.append(f"run fewer than {facts.workers} workers on this machine")
    if facts.others > 0:
        cures.append(f"end the programs that took {_size(facts.others)} since the start")
    elif _room(replace(facts, available=facts.available + facts.block * facts.workers)) > room:
        cures.append(
            f"end other programs ({_size(facts.available)} are available, of which {_size(facts.reserve)} stay free)"
        )
    if facts.stage:
        cures.append("give this Mac a lower model_memory in the rack file, so that the plan puts less on it")
    return f"{what}: {_size(least - room)} are missing; {' or '.join(cures)}."


def _size(number: int) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB // 10 else f"{number / (1 << 20):.2f} MiB"


@dataclass(frozen=True)
class MemorySnapshot:
    """The machine's memory at one moment.

    Attributes:
        total: of the machine, or of what confines this process: a control group, a limit.
        available: what can be taken without swapping.
        own: what this process holds there.
        reserve: what is to stay free of `available` when a KV cache is made.
    """

    total: int
    available: int
    own: int
    reserve: int = 0


def others_since(start: MemorySnapshot, now: MemorySnapshot) -> int:
    """What other processes took between the snapshots; what they gave back does not count as negative."""
    return max(0, (start.available - now.available) - (now.own - start.own))


def machine_limit(environ: Mapping[str, str]) -> int | None:
    """Bytes that workers may take for this machine's memory; None for all of it. Raises SettingsError."""
    text = environ.get(MACHINE_MEMORY)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 19 and int(text) > 0):
        raise SettingsError(f"{MACHINE_MEMORY}={text!r} is not accepted: set it to a number of bytes, or unset it.")
    return int(text)


def reserve_of(total: int) -> int:
    """What stays free of a machine's memory, for the system and for our processes."""
    return min(total // SYSTEM_SHARE, MOST_SYSTEM_BYTES) + OWN_BYTES


def limited(found: MemorySnapshot, limit: int | None) -> MemorySnapshot:
    """`found` on a machine that had `limit` bytes and ran this process only: its reserve lies outside of them."""
    if limit is None or limit >= found.total:
        return found
    left = max(0, min(found.available - found.reserve, limit - found.own))
    return replace(found, total=limit, available=left, reserve=0)


def snapshot(device: Device, environ: Mapping[str, str] = os.environ) -> MemorySnapshot:
    """The memory that `device` computes in: unified memory or RAM, or CUDA device memory. Raises SettingsError."""
    return limited(_snapshot(device), machine_limit(environ))


def _snapshot(device: Device) -> MemorySnapshot:
    mx.clear_cache()  # what MLX keeps for its next arrays, such as weights as they were stored, is nobody's
    arrays = int(mx.get_active_memory() + mx.get_cache_memory())
    if device.backend is GpuBackend.CUDA:
        info = mx.device_info(mx.Device(mx.gpu, 0))
        return MemorySnapshot(int(info["total_memory"]), int(info["free_memory"]), arrays, OWN_BYTES)
    memory = psutil.virtual_memory()
    total, available = _confined(int(memory.total), int(memory.available), cgroup_room())
    own = held(device.backend, arrays, int(psutil.Process().memory_info().rss))
    return MemorySnapshot(total, available, own, reserve_of(total))


def held(backend: GpuBackend | None, arrays: int, resident: int) -> int:
    """What this process holds of the machine's memory: MLX's arrays, and what is resident of the process.

    On the CPU the former are among the latter. Metal's buffers are not, as users of MLX report (omlx, issue 300: only
    macOS' phys_footprint has both); where a macOS counts them, too, less is taken for others' than is, and `available`
    still bounds the pool.
    """
    return arrays + resident if backend is GpuBackend.METAL else max(arrays, resident)


def memory_base(device: Device, now: MemorySnapshot) -> int:
    """The memory of which a fraction is taken: Metal's recommended working set, else the memory size."""
    if device.backend is GpuBackend.METAL:
        return min(int(mx.device_info(mx.Device(mx.gpu, 0))["max_recommended_working_set_size"]), now.total)
    return now.total


def cgroup_room(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """(limit, used) of the Linux control group at `root`, v2 or v1, page cache not counted as used; None if unlimited.

    Source: Linux Documentation/admin-guide/cgroup-v2.rst ("Memory Interface Files") and cgroup-v1/memory.rst.
    """
    for limit_file, used_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        if not (root / limit_file).is_file():
            continue
        limit = (root / limit_file).read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        used = int((root / used_file).read_text())
        return int(limit), max(0, used - int(stat.get(cache_key, "0")))
    return None


def _confined(total: int, available: int, group: tuple[int, int] | None) -> tuple[int, int]:
    """(total, available) within a control group's (limit, used); v1 writes a huge limit for none."""
    if group is None or group[0] >= total:
        return total, available
    limit, used = group
    return limit, max(0, min(available, limit - used))
