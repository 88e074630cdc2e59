"""Whether an engine computes images: decided once, when its configuration is, by the mode and what there is.

    mode, model, tower, options --SightFacts--obstacle--> None, or why not
    multimodal-native: an obstacle is a refusal    auto: a text model, and one line says why    text-only-compat: text

To vLLM the families that see are multimodal, whatever comes of it (model_registry.py). An engine that serves one as
text has no `multimodal_config`, which is what all of vLLM asks for.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.config.multimodal import ImageDummyOptions, MultiModalConfig

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.settings import MultimodalMode, Settings
from pomarium.worker.vision.families import SEEING, check_tower, eyes_of, has_library, read_preprocessor

logger = logging.getLogger("vllm.pomarium.images")

MODE = "VLLM_METAL_MULTIMODAL_MODE"
MOST_IMAGES = 8
"""Images of a prompt unless the operator says otherwise; vLLM's own is 999."""
CACHE_GB = 0.25
"""GiB of tiles that the engine keeps for images that come again, unless the operator says otherwise; vLLM's own is 4. A
picture of SmolVLM's has up to 13 MB."""

NOT_INSTALLED = "the package mlx-vlm, which has the vision towers, is not installed (run `pomarium setup` again)"


@dataclass(frozen=True)
class SightFacts:
    """What decides.

    Attributes:
        library: the towers' definitions are installed. stages: of the pipeline. paged: K and V are.
        tower: what is wrong with the checkpoint's tower, None if nothing.
        options: of vLLM's that mean another processing, as flags.
        own_scheduler: the scheduler is one of Pomarium's, which send images to workers.
    """

    library: bool = True
    stages: int = 1
    paged: bool = True
    tower: str | None = None
    options: tuple[str, ...] = ()
    own_scheduler: bool = True


def obstacle(facts: SightFacts) -> str | None:
    """Why images are not computed, as a clause; None if they are."""
    if not facts.library:
        return NOT_INSTALLED
    if facts.stages > 1:
        return "images run on whole models only (leave out --pipeline-parallel-size and --stages)"
    if not facts.paged:
        return "images run on the paged KV cache only (leave out VLLM_METAL_USE_PAGED_ATTENTION)"
    if facts.options:
        return f"{' and '.join(facts.options)} mean another processing (leave them out)"
    if not facts.own_scheduler:
        return "a scheduler of one's own sends no images to the worker (leave out --scheduler-cls)"
    return facts.tower


def settle(config: VllmConfig, settings: Settings) -> None:
    """Complete `config` for images, or make a text model of it. May run more than once on it.

    Raises:
        UnsupportedError: `multimodal-native`, and something is in the way.
    """
    model = config.model_config
    multimodal = model.multimodal_config
    if multimodal is None or SEEING.keys().isdisjoint(model.architectures):
        return
    mode, name = settings.multimodal_mode, model.architectures[0]
    reason = f"{MODE}={mode.value}" if mode is MultimodalMode.TEXT_ONLY_COMPAT else obstacle(facts_of(config, settings))
    if reason is None:
        _complete(
            multimodal, eyes_of(model.model, model.hf_config.to_dict(), model.hf_image_processor_config).longest_edge
        )
        logger.info("%s takes images: %d in a prompt.", name, multimodal.get_limit_per_prompt("image"))
        return
    if mode is MultimodalMode.NATIVE:
        raise UnsupportedError(
            f"{MODE}=multimodal-native asks for images, and {name} cannot take them: {reason}; or set {MODE}=auto, "
            "and it is served as a text model."
        )
    logger.warning("%s is served as a text model: %s.", name, reason)
    model.multimodal_config = None


def facts_of(config: VllmConfig, settings: Settings) -> SightFacts:
    """Of an engine's configuration; looks at the checkpoint's headers if nothing else is in the way."""
    from pomarium.cluster.engine.scheduling.install import OwnSchedulerConfig

    scheduling, multimodal = config.scheduler_config, config.model_config.multimodal_config
    facts = SightFacts(
        library=has_library(),
        stages=config.parallel_config.pipeline_parallel_size,
        paged=settings.paged_attention,
        options=_options(multimodal),
        own_scheduler=scheduling.scheduler_cls is None or isinstance(scheduling, OwnSchedulerConfig),
    )
    if obstacle(facts) is not None:
        return facts
    return SightFacts(tower=_tower(config.model_config, settings))


def _options(multimodal: MultiModalConfig) -> tuple[str, ...]:
    said = {
        "--mm-processor-kwargs": bool(multimodal.mm_processor_kwargs),
        "--media-io-kwargs": bool(multimodal.media_io_kwargs) and multimodal.media_io_kwargs.keys() != {_OURS},
        "--enable-mm-embeds": multimodal.enable_mm_embeds,
        "--mm-encoder-only": multimodal.mm_encoder_only,
        "--mm-processor-cache-type shm": multimodal.mm_processor_cache_type == "shm",
        "--mm-tensor-ipc torch_shm": multimodal.mm_tensor_ipc == "torch_shm",
        "--language-model-only": multimodal.language_model_only,
    }
    return tuple(flag for flag, given in said.items() if given)


_OURS = "image"


def _tower(model: Any, settings: Settings) -> str | None:
    from pomarium.worker.models.checkpoint import inspect, read_safetensors_header
    from pomarium.worker.models.resolve import resolve

    try:
        given = Path(model.model)
        folder = (
            given
            if given.is_dir()
            else resolve(
                model.model, use_modelscope=settings.use_modelscope, modelscope_cache=settings.modelscope_cache
            )
        )
        checkpoint = inspect(folder)
        names = {name for file in checkpoint.files for name in read_safetensors_header(file)}
        check_tower(folder, names)
        eyes_of(folder, model.hf_config.to_dict(), read_preprocessor(folder))
    except (CheckpointError, UnsupportedError) as error:
        return str(error).rstrip(".")
    return None


def _complete(multimodal: MultiModalConfig, longest_edge: int) -> None:
    limits = multimodal.limit_per_prompt
    if "image" not in limits:
        multimodal.limit_per_prompt = {**limits, "image": ImageDummyOptions(count=MOST_IMAGES)}
    if multimodal.mm_processor_cache_gb == MultiModalConfig.mm_processor_cache_gb:
        multimodal.mm_processor_cache_gb = CACHE_GB
    multimodal.media_io_kwargs = {_OURS: {"longest_edge": longest_edge}}
