"""The embeddings of a step's rows: the text model's own, and those of images where these stand.

token ids --embedding--> (T, hidden_size) --rows of images: EncoderCache--> (T, hidden_size)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from pomarium.worker.pictures import PictureRows
from pomarium.worker.vision.encoder_cache import EncoderCache


@dataclass(frozen=True)
class Sight:
    """What a text model sees with. embedding: of its tokens."""

    embedding: nn.Module
    cache: EncoderCache

    def embeddings(self, token_ids: mx.array, pictures: Sequence[PictureRows]) -> mx.array:
        """(T, hidden_size) of token ids int32 (T,), lazily. Raises KeyError as `EncoderCache.gather`."""
        text: mx.array = self.embedding(token_ids)
        rows, seen = self.cache.gather(pictures)
        text[rows] = seen.astype(text.dtype)
        return text


def embedding_of(module: nn.Module) -> nn.Module:
    """Of an mlx-lm text model that takes `input_embeddings`, as its llama does (mlx_lm/models/llama.py)."""
    embedding: nn.Module = module.model.embed_tokens
    return embedding
