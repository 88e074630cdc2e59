"""mlx-vlm's vision tower and connector, unmodified, with a checkpoint's weights.

    checkpoint --load_tower--> Tower
    tiles uint8 --Tower--> colours as floats --VisionModel--> patches --Idefics3Connector--> embeddings

Tiles come a few at a time, so that a step's arrays stay within `tower_activation_bytes`.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from pomarium.worker.activations import LIVE_ARRAYS
from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.checkpoint import inspect, read_safetensors_header
from pomarium.worker.vision.families import (
    LIBRARY,
    Eyes,
    check_tower,
    eyes_of,
    has_library,
    is_of_tower,
    read_preprocessor,
    tower_names,
)

TILES_AT_ONCE = 4
"""Tiles in one pass of the tower: more are no faster once a GPU is filled, and take memory."""
MISSING = "the package mlx-vlm is not installed; run `pomarium setup` again"


class Tower:
    """Images to embeddings.

    Attributes:
        eyes: how images are prepared. weight_bytes: of the parameters in memory.
    """

    def __init__(self, vision: nn.Module, connector: nn.Module, eyes: Eyes, dtype: mx.Dtype) -> None:
        self._vision = vision
        self._connector = connector
        self._dtype = dtype
        self.eyes = eyes
        parameters = [*tree_flatten(vision.parameters()), *tree_flatten(connector.parameters())]
        self.weight_bytes = sum(array.nbytes for _, array in parameters)

    @property
    def arrays(self) -> list[mx.array]:
        """The parameters."""
        modules = (self._vision, self._connector)
        return [array for module in modules for _, array in tree_flatten(module.parameters())]

    def __call__(self, tiles: np.ndarray) -> mx.array:
        """Embeddings (N * tokens_per_tile, hidden_size), evaluated, of tiles uint8 (N, 3, tile, tile) in RGB."""
        found = []
        for first in range(0, len(tiles), TILES_AT_ONCE):
            embeddings = self._embeddings(tiles[first : first + TILES_AT_ONCE])
            mx.eval(embeddings)
            found.append(embeddings)
        joined = mx.concatenate(found)
        mx.eval(joined)
        return joined

    def _embeddings(self, tiles: np.ndarray) -> mx.array:
        eyes = self.eyes
        colours = mx.array(tiles).astype(mx.float32).transpose(0, 2, 3, 1)
        colours = (colours * eyes.scale - mx.array(eyes.mean)) / mx.array(eyes.std)
        # Without a mask, for all of a tile is image (transformers' split_images). With one the definition
        # finds the patches' places by fractions in float32, and is off by one at 14, 26, 27 or 28 of them a side.
        patches, *_ = self._vision(colours.astype(self._dtype))
        embeddings: mx.array = self._connector(patches)
        return embeddings.reshape(-1, embeddings.shape[-1])


def load_tower(directory: Path, dtype: mx.Dtype) -> Tower:
    """The tower of the checkpoint in `directory`, in `dtype`, evaluated.

    Raises:
        UnsupportedError: mlx-vlm is not installed, or the tower is of a kind that is not computed.
        CheckpointError: weights are missing or do not fit.
    """
    if not has_library():
        raise UnsupportedError(f"{directory} cannot be served with images: {MISSING}.")
    from mlx_vlm.models.idefics3 import ModelConfig, TextConfig, VisionConfig, VisionModel
    from mlx_vlm.models.idefics3.idefics3 import Idefics3Connector

    checkpoint = inspect(directory)
    config = checkpoint.config
    names = {name for file in checkpoint.files for name in read_safetensors_header(file)}
    check_tower(directory, names)
    eyes = eyes_of(directory, config, read_preprocessor(directory))
    try:
        vision_config = VisionConfig.from_dict({"model_type": "idefics3_vision", **config["vision_config"]})
        whole = ModelConfig(TextConfig.from_dict(dict(config)), vision_config, "idefics3")
        whole.scale_factor = int(config.get("scale_factor", 2))
        vision, connector = VisionModel(vision_config), Idefics3Connector(whole)
        weights = {tower_names(name): array for name, array in _tensors(checkpoint.files).items()}
        weights = vision.sanitize(weights)
        for module, prefix in ((vision, "vision_model."), (connector, "connector.")):
            own = [(name.removeprefix(prefix), array) for name, array in weights.items() if name.startswith(prefix)]
            module.load_weights([(name, array.astype(dtype)) for name, array in own], strict=True)
            module.eval()
            mx.eval(module.parameters())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{directory}: its vision tower does not fit {LIBRARY}'s idefics3: {type(error).__name__}: {said}."
        ) from error
    return Tower(vision, connector, eyes, dtype)


def tower_activation_bytes(eyes: Eyes, vision: dict[str, Any], itemsize: int) -> int:
    """Bytes of the temporary arrays of TILES_AT_ONCE tiles: a layer's widest, and scores of attention where the CPU
    keeps them.

    Args:
        vision: `vision_config` of config.json.
    """
    patches = (eyes.tile // eyes.patch) ** 2
    hidden = int(vision["hidden_size"])
    width = max(hidden, int(vision.get("intermediate_size") or 4 * hidden))
    heads = int(vision.get("num_attention_heads") or 1)
    return TILES_AT_ONCE * patches * (width * itemsize * LIVE_ARRAYS + 2 * heads * patches * 4)


def _tensors(files: tuple[Path, ...]) -> dict[str, mx.array]:
    """The tower's tensors, lazily."""
    found: dict[str, mx.array] = {}
    for file in files:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= {name: array for name, array in loaded.items() if is_of_tower(name)}
    return found
