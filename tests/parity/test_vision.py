"""The tower and the text model around it, without an engine, against transformers' and mlx-vlm's own forward.

Also with 14, 27 and 28 patches a side, as released towers have them, whose places fractions in float32 miss, and with
tiles that are no multiple of a patch.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from equality import BOUND, logit_error
from vision_models import (
    FACTOR,
    FAKE_TOKEN,
    FAMILIES,
    GLOBAL_TOKEN,
    IMAGE_TOKEN,
    PREPROCESSOR,
    mlx_vlm_logits,
    seeing_config,
    torch_logits,
    write_seeing,
)

from pomarium.worker.models.load import load
from pomarium.worker.pictures import PictureRows
from pomarium.worker.step import Step
from pomarium.worker.vision.encoder_cache import EncoderCache
from pomarium.worker.vision.merge import Sight, embedding_of
from pomarium.worker.vision.tower import TILES_AT_ONCE, load_tower


def write_sized(family: str, directory: Path, tile: int, patch: int, factor: int) -> Path:
    """A release whose tiles have `tile` pixels a side, and patches `patch`."""
    vision = {**seeing_config(family)["vision_config"], "image_size": tile, "patch_size": patch}
    write_seeing(family, directory, vision_config=vision, scale_factor=factor)
    sizes = {"max_image_size": {"longest_edge": tile}, "size": {"longest_edge": 2 * tile}}
    (directory / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **sizes}))
    return directory


def ours(directory: Path, tokens: list[int], tiles: np.ndarray) -> np.ndarray:
    """Logits (T, vocabulary) of a prompt, by the worker's parts."""
    loaded = load(directory, dense=True, dtype=mx.float32)
    cache = EncoderCache(load_tower(directory, mx.float32))
    cache.take(Step({}, unseen={"picture": tiles}))
    rows = np.flatnonzero(np.array(tokens) == IMAGE_TOKEN).astype(np.int32)
    picture = PictureRows("picture", rows, np.arange(len(rows), dtype=np.int32))
    embeddings = Sight(embedding_of(loaded.model), cache).embeddings(mx.array(tokens), [picture])
    return np.array(loaded.model(mx.array([tokens]), input_embeddings=embeddings[None])[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("tile", "patch", "factor"), [(16, 4, FACTOR), (28, 2, 2), (29, 2, 2), (55, 2, 3), (56, 2, 4)], ids=str
)
def test_logits_are_transformers(family: str, tile: int, patch: int, factor: int, tmp_path: Path) -> None:
    directory = write_sized(family, tmp_path / family, tile, patch, factor)
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (TILES_AT_ONCE + 1, 3, tile, tile), dtype=np.uint8)
    each = (tile // patch // factor) ** 2
    tokens = [1, 50, *([FAKE_TOKEN, GLOBAL_TOKEN, *[IMAGE_TOKEN] * each] * len(tiles)), FAKE_TOKEN, 60, 61]
    got = ours(directory, tokens, tiles)
    assert logit_error(got, torch_logits(directory, tokens, tiles)) < BOUND
    if tile == 16:
        assert logit_error(got, mlx_vlm_logits(directory, tokens, tiles)) < BOUND
