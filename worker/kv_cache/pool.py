"""The paged pool: K and V of every layer in blocks, as MLX arrays that are written in place.

Layout of a buffer is (num_blocks, num_kv_heads, block_size, head_dim): one head's part of a block is contiguous, so
that reading a sequence copies runs of block_size x head_dim elements and the result is already (heads, tokens,
head_dim), the operand order of attention, without a transposing copy. V's buffer has V's width; a layer that keeps
latents has none, its values being a part of its keys.

In place means: a scatter reuses its input's buffer only while nobody else holds it. Each array therefore has exactly
one owner, this class, which rebinds it at each write; what `read` returns are copies. The step must be evaluated before
the next write is queued, else MLX copies the whole buffer (a 256 MB pool: 2.7 ms a step against 104).
"""

from collections.abc import Callable

import mlx.core as mx

from pomarium.worker.kv_cache.layout import CacheLayout


class PagedPool:
    """Owner of the K and V buffers."""

    def __init__(
        self,
        layout: CacheLayout,
        dtype: mx.Dtype,
        make: Callable[[int, tuple[int, int]], mx.array] | None = None,
    ) -> None:
        """Allocate the buffers of `layout` with elements of `dtype`.

        Args:
            make: a buffer of this shape for a layer; None: zeros. Without them nobody may `read` a block of which some
                rows were never written (attention.kernels.paged_pool).
        """
        self.layout, self.dtype = layout, dtype
        self._keys: dict[int, mx.array] = {}
        self._values: dict[int, mx.array] = {}
        for layer, cache in enumerate(layout.layers):
            buffer = layout.buffer_of_layer[layer]
            if buffer in self._keys:
                continue
            block_size = layout.group_of(layer).block_size
            rows = layout.num_blocks * cache.num_kv_heads * block_size
            widths = (cache.head_dim,) if cache.latent else (cache.head_dim, cache.value_dim)
            made = [mx.zeros((rows, width), dtype) if make is None else make(layer, (rows, width)) for width in widths]
            self._keys[buffer] = made[0]
            if not cache.latent:
                self._values[buffer] = made[1]
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to evaluate a step's writes."""
        return [*self._keys.values(), *self._values.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(array.nbytes for array in self.arrays)

    def write(self, layer: int, rows: mx.array, keys: mx.array, values: mx.array | None) -> None:
        """Store the K and V of T tokens.

        Args:
            rows: int32 (T, num_kv_heads), row of the flat buffer for each token and head.
            keys: (T, num_kv_heads, head_dim).
            values: (T, num_kv_heads, value_dim); None for a layer that keeps latents, and only there.
        """
        buffer = self.layout.buffer_of_layer[layer]
        self._keys[buffer][rows] = keys
        if values is not None:
            self._values[buffer][rows] = values

    def read(self, layer: int, blocks: mx.array) -> tuple[mx.array, mx.array]:
        """Copy the blocks of S sequences together.

        Args:
            blocks: int32 (S, num_kv_heads, B), index of each head's part of a block: block x num_kv_heads + head.

        Returns:
            K (S, num_kv_heads, B x block_size, head_dim) and V of value_dim, a view of K for a layer of latents.
        """
        buffer, cache = self.layout.buffer_of_layer[layer], self.layout.layers[layer]
        block_size = self.layout.group_of(layer).block_size
        keys = gathered(self._keys[buffer], blocks, block_size)
        if cache.latent:
            return keys, keys[..., : cache.value_dim]
        return keys, gathered(self._values[buffer], blocks, block_size)

    def keys_and_values(self, layer: int) -> tuple[mx.array, mx.array]:
        """The buffers of a layer, (rows, head_dim) and (rows, value_dim), for kernels that write them in place.

        Whoever takes them owns them: `write` and `read` are not for its layers any more (see kernels.ordered).
        """
        buffer = self.layout.buffer_of_layer[layer]
        return self._keys[buffer], self._values[buffer]

    def latents(self, layer: int) -> mx.array:
        """The buffer of a layer that keeps latents, (num_blocks x block_size, head_dim); see `keys_and_values`."""
        return self._keys[self.layout.buffer_of_layer[layer]]


def gathered(array: mx.array, blocks: mx.array, block_size: int) -> mx.array:
    """(S, heads, B x block_size, width) copied out of a buffer; blocks as for `PagedPool.read`."""
    sequences, heads, count = blocks.shape
    width = array.shape[-1]
    parts = mx.take(array.reshape(-1, block_size * width), blocks, axis=0)
    return parts.reshape(sequences, heads, count * block_size, width)
