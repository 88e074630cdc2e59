"""vLLM's multimodal processor for the families that see: an image becomes tiles, and a placeholder its tokens.

    PIL image --transformers' Idefics3ImageProcessorPil--> tiles uint8 (N, 3, tile, tile), rows, columns
    <image> in a prompt --of rows, columns--> <fake><row_1_col_1><image> x n ... \n\n<fake><global-img><image> x n<fake>

The processors of the releases hold one for videos, which needs torchvision; this holds the one for images alone, in its
form for Pillow. Colours stay bytes, a quarter of what floats take on their way to the worker, which scales them
(worker/vision/tower.py). Contract: vllm/multimodal/processing, vLLM 0.29. It runs on a thread of vLLM's renderer.

An image's key is made of its pixels. What a client calls an image (`uuid`) is not believed: others would be shown it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from vllm.config.multimodal import BaseDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
    cached_encode,
)

from pomarium.worker.vision.families import Eyes, eyes_of
from pomarium.worker.vllm_step import TILES

IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
"""Tokens of the releases (transformers/models/idefics3/processing_idefics3.py)."""
_COUNT, _ROWS, _COLUMNS = "count", "rows", "columns"


class PictureInfo(BaseProcessingInfo):
    """What a model takes: images."""

    @property
    def eyes(self) -> Eyes:
        """Of the model. Raises as `eyes_of`; the platform has asked before."""
        model = self.ctx.model_config
        return eyes_of(model.model, model.hf_config.to_dict(), model.hf_image_processor_config)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images, as far as the operator's limit goes, and nothing else."""
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Raises VLLMValidationError for what is no image, and for too many images."""
        if modality != "image":
            raise VLLMValidationError(f"This model takes images, no {modality}: leave it out.", parameter=modality)
        most = self.allowed_mm_limits["image"]
        if num_items > most:
            raise VLLMValidationError(
                f"A prompt may hold at most {most} image{'s' * (most != 1)} here: leave some out (the operator sets "
                "--limit-mm-per-prompt).",
                parameter="image",
            )

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Embeddings of the largest image, which the encoder cache has to hold."""
        return {"image": self.eyes.most_tokens}

    def tokens(self, rows: int, columns: int) -> list[int]:
        """What stands for an image of `rows` x `columns` tiles in a prompt; 0 x 0: of one tile."""
        image = IMAGE * self.eyes.tokens_per_tile
        text = "".join(
            "".join(f"{FAKE}<row_{row + 1}_col_{column + 1}>{image}" for column in range(columns)) + "\n"
            for row in range(rows)
        )
        text += "\n" * (rows > 0) + f"{FAKE}{GLOBAL}{image}{FAKE}"
        found: list[int] = cached_encode(self.get_tokenizer(), text, add_special_tokens=False)
        return found


class PictureDummies(BaseDummyInputsBuilder[PictureInfo]):
    """What vLLM warms its processor up with: one small image each."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """As many placeholders."""
        return IMAGE * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, BaseDummyOptions]
    ) -> MultiModalDataDict:
        """Images of one tile."""
        side = self.info.eyes.tile
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class PictureProcessor(BaseMultiModalProcessor[PictureInfo]):
    """See the module."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """vLLM's, for images that a request brings itself.

        Raises:
            VLLMValidationError: it asks for another processing, names an image without bringing it, or its prompt has
                no place for one.
        """
        if inputs.hf_processor_mm_kwargs:
            raise VLLMValidationError("mm_processor_kwargs is not supported: leave it out.")
        for items in inputs.mm_data_items.values():
            if any(item is None for item in items.get_all()):
                raise VLLMValidationError("An image has a uuid and no image_url: send the image with each request.")
        found: MultiModalInput = super().apply(replace(inputs, mm_uuid_items=None), timing_ctx)
        return found

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        if not mm_items.get("image"):
            return BatchFeature({})
        images = mm_items.get_items("image", ImageProcessorItems)
        prepared = [self._prepared(images.get(index)) for index in range(images.get_count())]
        return BatchFeature(
            {
                TILES: torch.from_numpy(np.concatenate([tiles for tiles, _, _ in prepared])),
                _COUNT: torch.tensor([len(tiles) for tiles, _, _ in prepared]),
                _ROWS: torch.tensor([rows for _, rows, _ in prepared]),
                _COLUMNS: torch.tensor([columns for _, _, columns in prepared]),
            }
        )

    def _prepared(self, image: Any) -> tuple[np.ndarray, int, int]:
        """(tiles, rows, columns) of one image; 0 rows and columns where it is not cut."""
        eyes = self.info.eyes
        processor = Idefics3ImageProcessorPil(
            size={"longest_edge": eyes.longest_edge},
            max_image_size={"longest_edge": eyes.tile},
            do_image_splitting=eyes.split,
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
            return_row_col_info=True,
        )
        found = processor([[image]])
        tiles = np.ascontiguousarray(np.asarray(found["pixel_values"])[0].astype(np.uint8, copy=False))
        return tiles, int(found["rows"][0][0]), int(found["cols"][0][0])

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        count = hf_inputs.get(_COUNT, torch.empty(0, dtype=torch.int64))
        batched = {key: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for key in (_COUNT, _ROWS, _COLUMNS)}
        return {TILES: MultiModalFieldConfig.flat_from_sizes("image", count), **batched}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.eyes.image_token

        def replacement(index: int) -> PromptUpdateDetails:
            item = out_mm_kwargs["image"][index]
            rows, columns = (int(item[key].data) for key in (_ROWS, _COLUMNS))
            return PromptUpdateDetails.select_token_id(self.info.tokens(rows, columns), token)

        return [PromptReplacement(modality="image", target=[token], replacement=replacement)]

    def _validate_mm_placeholders(self, mm_placeholders: Mapping[str, list[Any]], counts: Mapping[str, int]) -> None:
        for modality, count in counts.items():
            if len(mm_placeholders.get(modality, [])) != count:
                raise VLLMValidationError(
                    f"The prompt has no place for {count} image{'s' * (count != 1)}: the chat template, or the prompt, "
                    f"has to write {IMAGE} for each."
                )
