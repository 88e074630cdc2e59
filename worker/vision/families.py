"""The families whose images are computed, and what their checkpoints say of it: plain facts, without a vision library.

    config.json, preprocessor_config.json --eyes_of--> Eyes (sizes, colours, tokens), or one sentence
    names of tensors                      --is_of_tower--> those of tower and connector

Idefics3 and SmolVLM are one definition: an image is resized, cut into square tiles with a small copy of the whole, and
each tile becomes `tokens_per_tile` embeddings (Laurencon et al., "Building and better understanding vision-language
models", 2024; transformers/models/idefics3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.json_files import read_object

SEEING: Mapping[str, str] = MappingProxyType({
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "smolvlm",
})  # fmt: skip
"""Architecture in config.json -> its model type, of those whose images tests/parity/test_vision.py covers."""

LIBRARY = "mlx_vlm"
"""Package of the towers' definitions."""
PREPROCESSOR = "preprocessor_config.json"

TOWER, CONNECTOR = "vision_model.", "connector."
_OUTER = "model."
MAX_LONGEST_EDGE = 4096
"""Pixels of a side beyond which transformers resizes no image of this family (MAX_IMAGE_SIZE)."""
_LANCZOS = 1


@dataclass(frozen=True)
class Eyes:
    """How images become embeddings.

    Attributes:
        tile: pixels of a tile's side. longest_edge: to which an image's longer side is resized before it is cut.
        split: an image is cut; else it becomes one tile.
        scale, mean, std: a colour c of 0 .. 255 enters the tower as (c * scale - mean) / std.
        patch: pixels of a patch's side. tokens_per_tile: embeddings of a tile.
        image_token: id of the token in whose place they go.
    """

    tile: int
    longest_edge: int
    split: bool
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch: int
    tokens_per_tile: int
    image_token: int

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest image, its small copy included."""
        side = -(-min(self.longest_edge, MAX_LONGEST_EDGE) // self.tile)
        return side * side + 1 if self.split and side > 1 else 1

    @property
    def most_tokens(self) -> int:
        """Embeddings of the largest image."""
        return self.most_tiles * self.tokens_per_tile


def has_library() -> bool:
    """Whether the towers' definitions are installed; they are not imported."""
    return find_spec(LIBRARY) is not None


def is_of_tower(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the tower or to what connects it."""
    return name.removeprefix(_OUTER).startswith((TOWER, CONNECTOR))


def tower_names(name: str) -> str:
    """A tower's tensor as the definition names it."""
    return name.removeprefix(_OUTER)


def check_tower(where: Path | str, names: "frozenset[str] | set[str]") -> None:
    """Raises CheckpointError if `names` lack tower or connector, UnsupportedError if their weights are quantised."""
    held = [tower_names(name) for name in names if is_of_tower(name)]
    for part in (TOWER, CONNECTOR):
        if not any(name.startswith(part) for name in held):
            raise CheckpointError(f"{where} holds no vision tower: no tensor's name begins with {_OUTER}{part}")
    if quantised := sorted(name for name in held if name.endswith((".scales", ".weight_scale_inv"))):
        raise UnsupportedError(f"{where} has a quantised vision tower ({quantised[0]}), which is not read")


def read_preprocessor(directory: Path) -> dict[str, Any] | None:
    """preprocessor_config.json; None if there is none. Raises CheckpointError if it is no JSON object."""
    return dict(read_object(directory / PREPROCESSOR)) or None


def eyes_of(where: Path | str, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> Eyes:
    """How the images of a checkpoint are computed.

    Args:
        config: config.json, or what worker.models.checkpoint makes of it. preprocessor: preprocessor_config.json.

    Raises:
        CheckpointError: something is missing or contradicts itself.
        UnsupportedError: images are prepared in another way than this family's.
    """
    if preprocessor is None:
        raise CheckpointError(f"{where} holds no {PREPROCESSOR}, which says how images are prepared")
    try:
        vision = config["vision_config"]
        side, patch = int(vision["image_size"]), int(vision["patch_size"])
        factor, token = int(config.get("scale_factor", 2)), int(config["image_token_id"])
        tile = int(preprocessor["max_image_size"]["longest_edge"])
        longest = int(preprocessor.get("size", {}).get("longest_edge", 4 * tile))
        mean, std = (_colours(preprocessor, key) for key in ("image_mean", "image_std"))
        scale = float(preprocessor.get("rescale_factor", 1 / 255))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where}: its config.json and {PREPROCESSOR} do not describe a tower ({said})") from None
    if min(side, patch, factor, tile, longest) < 1 or side < patch or (side // patch) % factor:
        raise CheckpointError(
            f"{where}: images of {side} pixels are not made of patches of {patch}, {factor} by {factor}"
        )
    if tile != side:
        raise CheckpointError(f"{where}: tiles have {tile} pixels a side, but the tower sees {side}")
    for key, usual in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", _LANCZOS)):
        if preprocessor.get(key, usual) != usual:
            raise UnsupportedError(f"{where}: its {PREPROCESSOR} has {key}: {preprocessor[key]}, which is not computed")
    return Eyes(
        tile=tile,
        longest_edge=longest,
        split=bool(preprocessor.get("do_image_splitting", True)),
        scale=scale,
        mean=mean,
        std=std,
        patch=patch,
        tokens_per_tile=(side // patch // factor) ** 2,
        image_token=token,
    )


def _colours(preprocessor: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    red, green, blue = preprocessor.get(key, (0.5, 0.5, 0.5))
    return float(red), float(green), float(blue)
