"""Where vLLM puts the layers: its KVCacheConfig read as the layouts of our pools.

    KVCacheConfig --layout_of--> CacheLayout (K and V)      --state_layout_of--> StateLayout

vLLM places layers at addresses of one allocation; layers of different groups may be at the same address, since a block
belongs to one group at a time. Here each address is a buffer, or several where the layers at it differ in shape (Gemma
4's sliding and full layers): an MLX array is of one shape. Read structurally: this module does not import vLLM.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout, LayerCache
from pomarium.worker.kv_cache.states import StateCache, StateGroup, StateLayout


class Spec(Protocol):
    """vLLM's KVCacheSpec."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...


class Group(Protocol):
    """vLLM's KVCacheGroupSpec."""

    @property
    def layer_names(self) -> Sequence[str]:
        """Of the layers that share its block table."""
        ...

    @property
    def kv_cache_spec(self) -> Spec:
        """Of each of them."""
        ...


class Tensor(Protocol):
    """vLLM's KVCacheTensor."""

    @property
    def layers(self) -> Sequence[str]:
        """Names, `layer_stride` bytes apart from `offset` on."""
        ...

    @property
    def layer_stride(self) -> int:
        """Bytes."""
        ...

    @property
    def offset(self) -> int:
        """Bytes."""
        ...


class Config(Protocol):
    """vLLM's KVCacheConfig (v1/kv_cache_interface.py)."""

    @property
    def num_blocks(self) -> int:
        """Of each group."""
        ...

    @property
    def kv_cache_tensors(self) -> Sequence[Tensor]:
        """Placement of this worker's layers."""
        ...

    @property
    def kv_cache_groups(self) -> Sequence[Group]:
        """Of the whole model; those without a layer of this worker are there, but empty."""
        ...


def names_of(entries: Iterable[int]) -> tuple[str, ...]:
    """What vLLM calls the layers that are `entries` of the whole model's cache list."""
    return tuple(f"layers.{entry}" for entry in entries)


def layout_of(config: Config, layers: Sequence[LayerCache], names: Sequence[str], blocks: int) -> CacheLayout:
    """The layout of K and V.

    Args:
        layers, names: this worker's attention layers. blocks: of the pool's in one of vLLM's (kv_cache.paging).
    """
    groups = []
    for table, group in enumerate(config.kv_cache_groups):
        members = _members(group, names)
        # With --disable-hybrid-kv-cache-manager one table serves layers of different windows.
        for window in dict.fromkeys(layers[index].window for index in members):
            own = tuple(index for index in members if layers[index].window == window)
            groups.append(CacheGroup(own, group.kv_cache_spec.block_size // blocks, window, table))
    sizes = {index: group.block_size for group in groups for index in group.layers}
    shapes = [(*layer.shape, sizes[index]) for index, layer in enumerate(layers)]
    return CacheLayout(tuple(layers), tuple(groups), _buffers(config, names, shapes), config.num_blocks * blocks)


def state_layout_of(config: Config, states: Sequence[StateCache], names: Sequence[str]) -> StateLayout:
    """The layout of states: vLLM's blocks are their slots.

    Args:
        states, names: this worker's layers that keep states, all alike.
    """
    groups = [
        StateGroup(own, group.kv_cache_spec.block_size, table)
        for table, group in enumerate(config.kv_cache_groups)
        if (own := _members(group, names))
    ]
    return StateLayout(tuple(states), tuple(groups), _buffers(config, names, states), config.num_blocks)


def _members(group: Group, names: Sequence[str]) -> tuple[int, ...]:
    index_of = {name: index for index, name in enumerate(names)}
    return tuple(index_of[name] for name in group.layer_names if name in index_of)


def _buffers(config: Config, names: Sequence[str], shapes: Sequence[Hashable]) -> tuple[int, ...]:
    """For each layer the number of its buffer: of the address that vLLM puts it at, and of its shape."""
    addresses = {
        name: tensor.offset + place * tensor.layer_stride
        for tensor in config.kv_cache_tensors
        for place, name in enumerate(tensor.layers)
    }
    places = [(addresses[name], shape) for name, shape in zip(names, shapes, strict=True)]
    number = {place: index for index, place in enumerate(dict.fromkeys(places))}
    return tuple(number[place] for place in places)
