"""Facts about the KV cache: what a layer keeps, and where vLLM's blocks put it.

    LayerCache (from the model) --spec_of--> vLLM KVCacheSpec --vLLM--> KVCacheConfig --layout_of--> CacheLayout

vLLM groups layers of one kind (full attention, or one sliding window) into cache groups; each group has its own block
table per request. Block ids are global: a block belongs to one group at a time, so layers of different groups may share
one buffer and never overwrite each other, if they are of one shape. `buffer_of_layer` says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCK_SIZES = (8, 16, 32)
"""Tokens per block that the worker and its kernels accept."""


@dataclass(frozen=True)
class LayerCache:
    """What one attention layer keeps per token: K of (num_kv_heads, head_dim) and V of (num_kv_heads, value_dim).

    Attributes:
        window: tokens that a query sees, itself included; None for full attention.
        value_width: width of V where it is not K's (DeepSeek-V2, MiniCPM3).
        latent: V is not kept: it is the first `value_dim` elements of K (DeepSeek-V3's latents, its rope key behind).
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    value_width: int | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        if self.latent and self.value_dim > self.head_dim:
            raise ValueError(f"latents of {self.head_dim} elements hold no values of {self.value_dim}")

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self.head_dim if self.value_width is None else self.value_width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_kv_heads, width of K, width of V as it is kept): layers that differ in it cannot share a buffer."""
        return self.num_kv_heads, self.head_dim, 0 if self.latent else self.value_dim

    @property
    def elements(self) -> int:
        """Elements kept per token."""
        return self.num_kv_heads * (self.head_dim + (0 if self.latent else self.value_dim))


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share block tables and window, and so the index arrays of a step.

    Attributes:
        layers: layer indices. window: as in `LayerCache`. block_size: tokens per block.
        table: which of a request's block tables is theirs.
    """

    layers: tuple[int, ...]
    block_size: int
    window: int | None
    table: int


@dataclass(frozen=True)
class CacheLayout:
    """Where the K and V of each layer live.

    Attributes:
        layers: indexed by layer. groups: cover each layer once.
        buffer_of_layer: layer -> buffer; layers of different groups may share one, if they are of one shape.
        num_blocks: blocks per buffer. vLLM keeps block 0 as its null block; it is never written for a live token.
    """

    layers: tuple[LayerCache, ...]
    groups: tuple[CacheGroup, ...]
    buffer_of_layer: tuple[int, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        shapes: dict[int, tuple[int, int, int, int]] = {}
        for layer, cache in enumerate(self.layers):
            shape = (*cache.shape, self.group_of(layer).block_size)
            if shapes.setdefault(self.buffer_of_layer[layer], shape) != shape:
                raise ValueError(
                    f"layers of one KV buffer differ in shape: {shapes[self.buffer_of_layer[layer]]}, {shape}"
                )

    def group_of(self, layer: int) -> CacheGroup:
        """The cache group that `layer` belongs to."""
        return self.groups[self.group_index[layer]]

    @property
    def group_index(self) -> Mapping[int, int]:
        """Layer -> index of its group."""
        return {layer: index for index, group in enumerate(self.groups) for layer in group.layers}


def single_group_layout(layers: Sequence[LayerCache], block_size: int, num_blocks: int) -> CacheLayout:
    """A layout with one buffer per layer and one group per window: what the engine below vLLM uses on its own."""
    windows = list(dict.fromkeys(layer.window for layer in layers))
    groups = tuple(
        CacheGroup(tuple(i for i, layer in enumerate(layers) if layer.window == window), block_size, window, table)
        for table, window in enumerate(windows)
    )
    return CacheLayout(tuple(layers), groups, tuple(range(len(layers))), num_blocks)
