"""How many tokens a model's embedding holds.

    loaded module --run of one token, up to its first look-up--> rows of the table

MLX checks no bounds: a token beyond the last row is read from whatever lies behind the table. So the vocabulary that
vLLM reads in config.json, by which it admits requests, must not be larger than the table. The two differ where a
configuration leaves the size out and transformers and mlx-lm each have a default of their own.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.stages import as_classes, subclass


class _FoundError(Exception):
    """The run has met the look-up; what it would compute after that is not wanted."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


def embedding_rows(module: nn.Module) -> int | None:
    """Rows of the table in which `module` looks its token ids up; None if it does so other than by an embedding layer.

    Computes nothing and reads no weight.
    """
    tokens = mx.zeros((1, 1), mx.int32)

    def watched(base: type[nn.Module]) -> type[nn.Module]:
        look_up: Callable[..., mx.array] = base.__call__

        def call(layer: nn.Module, indices: mx.array) -> mx.array:
            if indices is tokens:  # and not positions
                raise _FoundError(layer["weight"].shape[0])
            return look_up(layer, indices)

        return subclass(base, {"__call__": call})

    tables = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.QuantizedEmbedding)]
    try:
        with as_classes([(table, watched(type(table))) for table in tables]):
            module(tokens, cache=make_prompt_cache(module))
    except _FoundError as found:
        return found.rows
    return None


def check_vocabulary(module: nn.Module, vocab_size: int, directory: Path) -> None:
    """Raises CheckpointError if the embedding of the model in `directory` holds fewer than `vocab_size` tokens."""
    rows = embedding_rows(module)
    if rows is not None and rows < vocab_size:
        raise CheckpointError(
            f"{directory} has an embedding of {rows} tokens, but its config.json stands for a vocabulary of "
            f'{vocab_size}; write "vocab_size": {rows} into config.json.'
        )
