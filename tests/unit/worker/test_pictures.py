"""Which rows take which embeddings, against a walk over the tokens; and what a checkpoint says of its eyes."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vision_models import PREPROCESSOR, seeing_config

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.pictures import Picture, rows_of_pictures
from pomarium.worker.vision.families import check_tower, eyes_of

TAKES = st.lists(st.booleans(), min_size=1, max_size=9)


@given(gaps=st.lists(st.tuples(st.integers(0, 4), TAKES), max_size=4), tail=st.integers(0, 4), data=st.data())
def test_each_placeholder_takes_its_embedding(gaps: list[tuple[int, list[bool]]], tail: int, data: Any) -> None:
    pictures, stands = [], []
    for number, (gap, takes) in enumerate(gaps):
        pictures.append(Picture(str(number), len(stands) + gap, len(takes), np.array(takes)))
        marks = [(str(number), sum(takes[:i])) if taking else None for i, taking in enumerate(takes)]
        stands += [None] * gap + marks
    stands += [None] * tail
    start = data.draw(st.integers(0, len(stands)))
    end, first = data.draw(st.integers(start, len(stands))), data.draw(st.integers(0, 5))
    found = {
        int(row): (picture.key, int(embedding))
        for picture in rows_of_pictures(pictures, start, end, first)
        for row, embedding in zip(picture.rows, picture.embeddings, strict=True)
    }
    assert found == {first + at - start: stands[at] for at in range(start, end) if stands[at] is not None}


def test_sizes_of_a_released_model() -> None:
    """SmolVLM-256M's config.json and preprocessor_config.json."""
    config = {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4, "image_token_id": 49190}
    preprocessor = {**PREPROCESSOR, "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}
    eyes = eyes_of("SmolVLM", config, preprocessor)
    assert (eyes.tokens_per_tile, eyes.most_tiles, eyes.most_tokens) == (64, 17, 1088)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"max_image_size": {"longest_edge": 24}}, CheckpointError, "24 pixels a side, but the tower sees 16"),
        ({"max_image_size": None}, CheckpointError, "do not describe a tower"),
        ({"image_mean": [0.5]}, CheckpointError, "do not describe a tower"),
        ({"do_normalize": False}, UnsupportedError, "do_normalize: False"),
        ({"resample": 3}, UnsupportedError, "resample: 3"),
    ],
)
def test_what_is_not_computed_is_named(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        eyes_of("there", seeing_config("idefics3"), json.loads(json.dumps(PREPROCESSOR)) | changes)
    with pytest.raises(CheckpointError, match=r"holds no preprocessor_config\.json"):
        eyes_of("there", seeing_config("idefics3"), None)


def test_a_tower_is_whole_and_dense() -> None:
    vision, connector = "model.vision_model.post_layernorm.weight", "model.connector.modality_projection.proj.weight"
    check_tower("there", {vision, connector, "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"begins with model\.connector\."):
        check_tower("there", {vision})
    with pytest.raises(UnsupportedError, match="quantised vision tower"):
        check_tower("there", {vision, connector, "vision_model.encoder.layers.0.mlp.fc1.scales"})
