"""rack.yaml -> what placement computes with: the memory, speed and links of each Mac.

    Inventory --rack_of--> placement.model.Rack

ESTIMATES, both replaced by measured values in rack.yaml: a GPU's working set is two thirds of a Mac's memory up to
36 GiB and three quarters beyond (what macOS recommends unless `iogpu.wired_limit_mb` is set), of which the worker's
default share is taken; and a model sees a part of a chip's published bandwidth and computed FLOP/s only.
"""

from pomarium.cluster.machine.chips import identify
from pomarium.cluster.placement.model import Link, Mac, Network, Rack
from pomarium.cluster.rack.inventory import Inventory, LinkEntry, MacEntry
from pomarium.worker.settings import AUTO_FRACTION

REACHED_BANDWIDTH = 0.75
"""Share of the published memory bandwidth that decoding is taken to reach."""
REACHED_FLOPS = 0.6
"""Share of the computed FLOP/s that large products are taken to reach."""

PROCESS_BYTES = 1 << 30
"""What a worker's process holds beside the model where it computes on the CPU: 0.8 GiB were seen with SmolLM2's stages,
most of it imports."""

_SMALL = 36 << 30


def rack_of(inventory: Inventory) -> Rack:
    """Raises SettingsError for a chip that is not in the table, saying what to write instead."""
    network = network_of(inventory)
    return Rack(tuple(_mac(entry) for entry in inventory.macs), network.default, network.pairs)


def network_of(inventory: Inventory) -> Network:
    """The links between the Macs."""
    pairs = {frozenset(pair.between): _link(pair) for pair in inventory.links.pairs}
    return Network(_link(inventory.links.default), pairs)


def working_set(memory: int) -> int:
    """Bytes that macOS recommends for the GPU on a Mac with so much memory."""
    return memory * 2 // 3 if memory <= _SMALL else memory * 3 // 4


def cpu_model_memory(memory: int, fraction: float = AUTO_FRACTION) -> int:
    """Bytes for models on a machine with `memory` that computes on the CPU, where the workers' own share the memory."""
    return max(1, min(int(memory * fraction), memory - PROCESS_BYTES))


def _mac(entry: MacEntry) -> Mac:
    memory = entry.model_memory
    if memory is None:
        memory = int(working_set(entry.memory) * AUTO_FRACTION)
    bandwidth, flops = entry.bandwidth, entry.flops
    if bandwidth is None or flops is None:
        chip = identify(entry.chip or "", entry.gpu_cores)
        bandwidth = bandwidth or chip.bandwidth * REACHED_BANDWIDTH
        flops = flops or chip.flops * REACHED_FLOPS
    return Mac(entry.name, memory, bandwidth, flops)


def _link(entry: LinkEntry) -> Link:
    return Link(entry.bandwidth, entry.latency)
