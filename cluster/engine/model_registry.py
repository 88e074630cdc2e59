"""Tells vLLM what it has to know of a model without importing vLLM's torch implementation of it.

    architecture in config.json --ModelRegistry--> MlxDecoder --> text generation, stages, no recurrent state, ...

vLLM finds out what a model can do by importing its class in a process of its own, which takes half a minute where no
earlier start left the answer in the cache. The class computes nothing here: models come from mlx-lm. So the families
that the worker is proven on (`worker.models.verify.PROVEN`) are registered with a stand-in, as all of them have the
same answers; architectures that vLLM has no class for are served that way, too. Every other one goes through vLLM's own
inspection, and is admitted or refused on what that says. Hybrids with gated-delta layers have a stand-in of their own,
which makes vLLM plan for states beside K and V (vllm/model_executor/models/config.py, MambaModelConfig).

Multimodal wrappers on the allowlist (`worker.models.wrappers`) get the stand-in of their text model, so that to vLLM
they are text models: it sets up no processor, and answers a request with an image with an error that says so. Those
whose images can be computed (`worker.vision.families`) get one that takes images; whether they do is settled with the
engine's configuration (images/sight.py). All other
multimodal architectures get a stand-in, too, only to be refused at admission: vLLM's inspection of them fails where a
package for images is missing, and says neither that nor what to serve instead.
"""

from typing import Any, ClassVar, NoReturn

import torch
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS, ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY

from pomarium.cluster.engine.admission import HYBRIDS
from pomarium.worker.models.wrappers import WRAPPERS
from pomarium.worker.vision.families import SEEING

ARCHITECTURES = frozenset({
    "ApertusForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Gemma4ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeLiteForCausalLM",
    "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "HeliumForCausalLM",
    "HunYuanDenseV1ForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM", "MiMoForCausalLM",
    "MiniCPM3ForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
    "NemotronForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM",
    "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM", "YoutuForCausalLM",
})  # fmt: skip
"""What config.json calls the families of PROVEN: plain decoders that generate text."""


REFUSED_MULTIMODAL = frozenset(_MULTIMODAL_MODELS) - WRAPPERS.keys()
"""Architectures that vLLM serves with images or sound, and that are not on the allowlist."""

_CHOOSES_TORCH_ATTENTION = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
"""Architectures whose configuration vLLM changes to name one of its attention backends (Gemma4Config in its
models/config.py): its GPU kernels do not take heads of two sizes. A backend named here is refused at admission."""


class MlxDecoder(torch.nn.Module):
    """A plain decoder, as vLLM's registry sees one (vllm/model_executor/models/interfaces_base.py). Never made."""

    supports_pp: ClassVar[bool] = True

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        raise NotImplementedError("models are run by the MLX worker, not by torch")

    def embed_input_ids(self, input_ids: torch.Tensor) -> NoReturn:
        """Part of the interface."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate_tensors: Any = None) -> NoReturn:
        """Part of the interface."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> NoReturn:
        """Part of the interface: what marks a text generator."""
        raise NotImplementedError

    def make_empty_intermediate_tensors(self, *args: Any) -> NoReturn:
        """Part of the interface: what pipeline stages need."""
        raise NotImplementedError


class MlxHybrid(MlxDecoder):
    """A decoder some of whose layers keep a state per sequence (IsHybrid in vLLM's interfaces.py)."""

    is_hybrid: ClassVar[bool] = True
    has_inner_state: ClassVar[bool] = True


def _info(*args: Any) -> Any:
    from pomarium.cluster.engine.images.processor import PictureInfo  # imports what text models have no use for

    return PictureInfo(*args)


def _dummies(*args: Any) -> Any:
    from pomarium.cluster.engine.images.processor import PictureDummies

    return PictureDummies(*args)


def _processor(*args: Any, **options: Any) -> Any:
    from pomarium.cluster.engine.images.processor import PictureProcessor

    return PictureProcessor(*args, **options)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=_dummies)
class MlxSeeing(MlxDecoder):
    """A decoder that takes images (SupportsMultiModal in vLLM's interfaces.py)."""

    supports_multimodal: ClassVar[bool] = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in a prompt, where the chat template does not write it."""
        return "<image>" if modality == "image" else None

    def embed_multimodal(self, **kwargs: object) -> NoReturn:
        """Part of the interface."""
        raise NotImplementedError


def register() -> None:
    """Make the stand-ins known to vLLM in this process; calling it again changes nothing."""
    for architecture in SEEING:
        ModelRegistry.register_model(architecture, MlxSeeing)
    for architecture in (ARCHITECTURES | REFUSED_MULTIMODAL | (WRAPPERS.keys() - HYBRIDS)) - SEEING.keys():
        ModelRegistry.register_model(architecture, MlxDecoder)
    for architecture in HYBRIDS:
        ModelRegistry.register_model(architecture, MlxHybrid)
    for architecture in _CHOOSES_TORCH_ATTENTION:
        MODELS_CONFIG_MAP.pop(architecture, None)
