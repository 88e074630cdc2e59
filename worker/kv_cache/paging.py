"""vLLM's blocks and the pool's, where a model keeps more than one shape of K and V: states, or heads of two sizes.

    LayerCache, StateCache --paging_of--> Paging --vllm_translation--> block sizes and padded pages of vLLM's specs
    vLLM's block ids --Paging.expand--> the pool's block ids

vLLM hands out one kind of block to all layers (v1/core/kv_cache_utils.py): a page of attention takes as many bytes as a
page that holds a state. So vLLM's attention blocks grow to the size of a state, hundreds of tokens, while the pool and
its kernels keep blocks of 8 to 32; the pool's are numbered so that those of one of vLLM's follow one another.

MLX arrays of K and V and of states cannot lie in the same memory, as vLLM's pages do, nor can K and V of layers whose
heads differ (Gemma 4: vLLM evens out their pages with more tokens for smaller heads). Each block id therefore has room
in all of them, and `physical` and `reported` translate between the bytes that this takes and those that vLLM counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.states import StateCache
from pomarium.worker.step import BlockTables


@dataclass(frozen=True)
class Paging:
    """How blocks relate.

    Attributes:
        block_size: tokens in a block of the pool. blocks: of the pool's in one of vLLM's, of attention layers.
        page: bytes of one of vLLM's blocks in one layer. state: bytes of a state; 0 without states.
        shapes: of K and V that may lie at one of vLLM's addresses.
    """

    block_size: int
    blocks: int = 1
    page: int = 1
    state: int = 0
    shapes: int = 1

    @property
    def tokens(self) -> int:
        """In a block of vLLM's."""
        return self.block_size * self.blocks

    def physical(self, counted: int) -> int:
        """Bytes that blocks take which vLLM counts as `counted` bytes."""
        return counted * self.shapes + -(-counted * self.state // self.page)

    def reported(self, held: int) -> int:
        """Bytes that vLLM may count so that its blocks take at most `held`."""
        return held * self.page // (self.page * self.shapes + self.state)


def paging_of(layers: Sequence[LayerCache], states: Sequence[StateCache], itemsize: int, block_size: int) -> Paging:
    """The smallest of vLLM's blocks that hold the states of a model; the pool's own if it keeps none.

    Args:
        layers, states: of the whole model, all stages. itemsize: bytes of an element of K and V.
    """
    # Layers of one window are in one group, where each has an address of its own.
    shapes = len({layer.shape for layer in layers}) if len({layer.window for layer in layers}) > 1 else 1
    if not states:
        return Paging(block_size, shapes=shapes)
    block = max(layer.elements for layer in layers) * itemsize * block_size
    state = max(cache.nbytes for cache in states)
    blocks = -(-state // block)
    return Paging(block_size, blocks, blocks * block, state, shapes)


def expand(tables: BlockTables, blocks: Sequence[int]) -> BlockTables:
    """vLLM's block tables as the pool's.

    Args:
        blocks: for each table how many of the pool's one of vLLM's is; 1 for tables of states.
    """
    return tuple(
        table if count == 1 else tuple(block * count + part for block in table for part in range(count))
        for table, count in zip(tables, blocks, strict=True)
    )
