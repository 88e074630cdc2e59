"""What a model costs, from the headers of its files alone: no weight is read, a GGUF file is not converted.

    MODEL --read_headers--> directory --headers_of_directory--+
                            GGUF file --headers_of_gguf-------+--> Headers --profile_of--> Profile(ModelProfile, sizes)
                                                                      '--converted--> as a CPU's worker holds them

Tensors are counted as they lie in memory: as stored, but GGUF tensors as the converter writes them (families.py,
quantization.py) and FP8 ones at 16 bits, to which mlx-lm expands them. What mlx-lm does not load (vision, audio, layers
for speculation) is left out and reported, but for the towers of families that see: these count on every stage, whether
images are served or not. K and V come from the config's heads, latents and windows; for families whose
windows mlx-lm is not known to apply, all tokens are counted. Operations are ESTIMATED as two for each weight that a
token uses.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from pomarium.cluster.placement.model import LayerProfile, ModelProfile
from pomarium.worker.activations import activation_bytes, layer_width
from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.home import user_path
from pomarium.worker.models import embedded
from pomarium.worker.models.forms.windows import layer_windows
from pomarium.worker.models.gguf.families import ROPE_FREQS, family_of, mlx_name, model_config
from pomarium.worker.models.gguf.metadata import Metadata
from pomarium.worker.models.gguf.quantization import AFFINE_BITS, GROUP_SIZE
from pomarium.worker.models.gguf.reader import TensorInfo, read_header
from pomarium.worker.models.wrappers import WRAPPED_IN
from pomarium.worker.vision.families import SEEING, is_of_tower

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EXPERTS = re.compile(r"\.(?:experts|switch_mlp)\.")
_NOT_LOADED = re.compile(
    r"(?:^|\.)(?:vision\w*|visual\w*|audio\w*|embed_vision|embed_audio|multi_modal_projector|mm_projector|mtp\w*|nextn)\."
    r"|rotary_emb\.inv_freq$"
)
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings"})
_HEADS = frozenset({"lm_head", "embed_out", "output"})
_WINDOWED = frozenset({
    "llama", "mistral", "ministral3", "gemma3", "gemma3_text", "gemma4_text", "gpt_oss", "olmo3", "cohere2",
    "exaone4",
})  # fmt: skip
"""Model types whose windowed layers mlx-lm itself gives a RotatingKVCache; a test compares them with the worker's.

For others worker.models.forms.windows tells.
"""

_LATENT = frozenset({"deepseek_v3", "kimi_k2", "glm4_moe_lite"})
"""Model types whose layers cache a latent and a rotated key, shared by all heads (absorbed latent attention)."""

_EXPANDED = frozenset({"deepseek_v2", "minicpm3", "youtu_llm"})
"""Model types whose layers expand latents to K and V of unequal width before they cache them."""

_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_KV_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Tensor:
    """mlx-lm's or the checkpoint's own name; bytes in the file and in memory; weights encoded (0 for scales)."""

    name: str
    stored: int
    memory: int
    weights: float


@dataclass(frozen=True)
class Headers:
    """What the headers of a checkpoint say.

    Attributes:
        name: of the model. where: of its files, for messages.
        tensors: named as mlx-lm or Hugging Face names them. config: its config.json.
        dtype: of activations, K and V.
    """

    name: str
    where: str
    tensors: tuple[Tensor, ...]
    config: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True)
class Profile:
    """A model's costs with what they were computed from.

    Attributes:
        stored_bytes: of all tensors in the files. left_out_bytes: those of them that are not loaded.
        dtype: of activations, K and V. intermediate_size, hidden_size, vocab_size: widths.
        longest_context: max_position_embeddings, None if the config does not say.
    """

    model: ModelProfile
    stored_bytes: int
    left_out_bytes: int
    dtype: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    longest_context: int | None

    def stage_bytes(self, *, rows: int, sampled: int) -> int:
        """What a stage takes beside weights and KV cache in steps of `rows` tokens, `sampled` of them sampled."""
        return activation_bytes(
            rows=rows,
            sampled=sampled,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            itemsize=_KV_ITEM[self.dtype],
        )


@dataclass(frozen=True)
class Profiles:
    """One model's costs where weights stay as they are stored, and where all become float32 (on a CPU)."""

    stored: Profile
    dense: Profile


def read_profiles(model: str | None) -> Profiles:
    """Both profiles of a model. Raises as `read_headers`, and CheckpointError as `profile_of`."""
    headers = read_headers(model)
    return Profiles(profile_of(headers), profile_of(converted(headers, "float32")))


def read_profile(model: str | None) -> Profile:
    """The profile of a model as it is stored. Raises as `read_headers`, and CheckpointError as `profile_of`."""
    return profile_of(read_headers(model))


def read_headers(model: str | None) -> Headers:
    """The headers of anything that `worker.models.resolve` takes; ids are fetched as for serving.

    Raises:
        CheckpointError: there is no such model, or its headers are damaged or incomplete.
        UnsupportedError: a model type, quantisation or GGUF architecture that is not served.
    """
    if model is None or model in (embedded.NAME, "embedded"):
        return headers_of_gguf(embedded.gguf_file(), embedded.NAME)
    path = user_path(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return headers_of_gguf(path, path.stem)
    from pomarium.worker.models import resolve  # imports mlx-lm, and so torch: seconds that a GGUF file does without

    return headers_of_directory(resolve.resolve(model), Path(model).name)


def converted(headers: Headers, dtype: str) -> Headers:
    """As if all weights were of `dtype` in memory, to which a CPU's worker converts them."""
    tensors = tuple(replace(tensor, memory=round(tensor.weights * _KV_ITEM[dtype])) for tensor in headers.tensors)
    return replace(headers, tensors=tensors, dtype=dtype)


def headers_of_directory(directory: Path, name: str) -> Headers:
    """The headers of an mlx-lm directory. Raises as `worker.models.checkpoint.inspect` does."""
    from pomarium.worker.models.checkpoint import inspect, read_safetensors_header

    checkpoint = inspect(directory)
    config = checkpoint.config
    entry = config.get("quantization") or config.get("quantization_config") or {}
    doubled = checkpoint.quantisation is not None and checkpoint.quantisation.method == "fp8"
    usual = (checkpoint.quantisation.bits if checkpoint.quantisation else None) or 4
    tensors = []
    for file in checkpoint.files:
        for key, (dtype, size) in read_safetensors_header(file).items():
            own = entry.get(key.rsplit(".", 1)[0])
            bits = own["bits"] if isinstance(own, dict) and "bits" in own else usual
            memory = 2 * size if doubled and dtype.startswith("F8_E4") else size
            tensors.append(Tensor(key, size, memory, _weights(key, dtype, size, bits)))
    return Headers(name, str(directory), tuple(tensors), config, checkpoint.dtype)


def headers_of_gguf(file: Path, name: str) -> Headers:
    """The headers of a GGUF file as they would be after conversion. Raises as the converter does for its header."""
    header = read_header(file)
    metadata = Metadata(file, header.metadata)
    family = family_of(metadata)
    config = model_config(header, family)
    tensors = []
    for key, info in header.tensors.items():
        try:
            target = mlx_name(family, key, config["num_hidden_layers"])
        except KeyError:
            raise UnsupportedError(f"{file}: its tensor {key!r} has no place in {family.model_type}.") from None
        memory = 0 if target is None else _converted_bytes(info, family.norms_plus_one)
        weights = math.prod(info.shape) if target is not None else 0
        tensors.append(Tensor(target or ROPE_FREQS, info.nbytes, memory, weights))
    kind = header.tensors["token_embd.weight"].type
    if family.norms_plus_one or kind is GGMLQuantizationType.BF16:
        dtype = "bfloat16"
    else:
        dtype = "float32" if kind is GGMLQuantizationType.F32 else "float16"
    return Headers(name, str(file), tuple(tensors), config, dtype)


def _converted_bytes(info: TensorInfo, norms_plus_one: bool) -> int:
    """Bytes of the arrays that worker/models/gguf/convert.py writes for a tensor."""
    count = math.prod(info.shape)
    if len(info.shape) == 2 and info.type in AFFINE_BITS:
        return count * AFFINE_BITS[info.type] // 8 + count // GROUP_SIZE * 4  # scales and biases, 16 bits each
    as_norm = norms_plus_one and info.name.split(".")[-2].endswith("norm")
    return count * (4 if as_norm or info.type is GGMLQuantizationType.F32 else 2)


def _weights(name: str, dtype: str, size: int, bits: int) -> float:
    if name.endswith((".scales", ".biases", "_scales", ".weight_scale", "_scale_inv", ".scale", ".qzeros")):
        return 0.0
    return size / _ITEM[dtype] if dtype in _ITEM else size * 8 / bits


def profile_of(headers: Headers) -> Profile:
    """What the model costs.

    Raises:
        CheckpointError: the config lacks a size, or a layer has no tensor.
    """
    where, dtype = headers.where, headers.dtype
    text = headers.config.get("text_config")
    facts = {**headers.config, **text} if isinstance(text, dict) else dict(headers.config)
    count = _size(facts, ("num_hidden_layers", "n_layers", "n_layer"), where)
    hidden = _size(facts, ("hidden_size", "n_embd", "d_model"), where)
    sees = headers.config.get(WRAPPED_IN) in SEEING.values()
    layers: list[list[Tensor]] = [[] for _ in range(count)]
    ends: dict[str, list[Tensor]] = {"embedding": [], "head": [], "norm": [], "shared": [], "left out": []}
    for tensor in headers.tensors:
        match = _LAYER.search(tensor.name)
        if sees and is_of_tower(tensor.name):
            ends["shared"].append(tensor)
        elif _NOT_LOADED.search(tensor.name) or (match and int(match[1]) >= count) or tensor.memory == 0:
            ends["left out"].append(tensor)
        elif match:
            layers[int(match[1])].append(tensor)
        else:
            ends[_end(tensor.name)].append(tensor)
    if empty := [index for index, held in enumerate(layers) if not held]:
        raise CheckpointError(f"{where} is incomplete: layer {empty[0]} of {count} has no tensors.")
    tied = not ends["head"]
    matrix = ends["embedding"] if tied else ends["head"]
    model = ModelProfile(
        headers.name,
        tuple(_layer(index, held, facts, dtype, where) for index, held in enumerate(layers)),
        embedding_bytes=_memory(ends["embedding"]),
        head_bytes=_memory(ends["head"]) + _memory(ends["norm"]),
        tied=tied,
        hidden_bytes=hidden * _KV_ITEM[dtype],
        head_flops=2.0 * sum(t.weights for t in matrix),
        shared_bytes=_memory(ends["shared"]),
    )
    return Profile(
        model,
        stored_bytes=sum(t.stored for t in headers.tensors),
        left_out_bytes=sum(t.stored for t in ends["left out"]),
        dtype=dtype,
        hidden_size=hidden,
        intermediate_size=layer_width(facts, hidden),
        vocab_size=_size(facts, ("vocab_size",), where),
        longest_context=facts.get("max_position_embeddings"),
    )


def _end(name: str) -> str:
    owner = name.split(".")[-2] if "." in name else name
    if owner in _EMBEDDINGS:
        return "embedding"
    if owner in _HEADS:
        return "head"
    return "norm" if "norm" in owner or owner == "ln_f" else "shared"


def _layer(index: int, held: list[Tensor], facts: Mapping[str, Any], dtype: str, where: str) -> LayerProfile:
    experts = [t for t in held if _EXPERTS.search(t.name)]
    share = _active_share(facts) if experts else 1.0
    heads = _size(facts, ("num_attention_heads", "n_heads", "n_head"), where)
    kept, multiplied = _attention_elements(index, facts, heads, where)
    used = sum(t.weights for t in held) - (1 - share) * sum(t.weights for t in experts)
    return LayerProfile(
        weight_bytes=_memory(held),
        flops=2.0 * used,
        kv_bytes=kept * _KV_ITEM[dtype],
        expert_bytes=_memory(experts),
        active_share=share,
        attention_flops=2.0 * heads * multiplied,
        window=_window(index, facts),
    )


def _attention_elements(index: int, facts: Mapping[str, Any], heads: int, where: str) -> tuple[int, int]:
    """Elements that a layer caches per token, and those of K and V together that a query head is multiplied with."""
    hidden = _size(facts, ("hidden_size", "n_embd", "d_model"), where)
    if facts["model_type"] in _LATENT | _EXPANDED:
        rope = _size(facts, ("qk_rope_head_dim",), where)
        if facts["model_type"] in _LATENT:
            rank = _size(facts, ("kv_lora_rank",), where)
            return rank + rope, 2 * rank + rope
        width = _size(facts, ("qk_nope_head_dim",), where) + rope
        value = facts.get("v_head_dim") if facts["model_type"] != "minicpm3" else None  # mlx-lm does not read it there
        both = width + int(value or hidden // heads)
        return heads * both, both
    if facts["model_type"] == "gemma4_text":
        return _gemma4_elements(index, facts, where)
    width = int(facts.get("head_dim") or hidden // heads)
    return 2 * int(facts.get("num_key_value_heads") or heads) * width, 2 * width


def _gemma4_elements(index: int, facts: Mapping[str, Any], where: str) -> tuple[int, int]:
    """As above: full layers have heads of their own size, the last ones share K and V of earlier ones."""
    width, key_heads = (_size(facts, (name,), where) for name in ("head_dim", "num_key_value_heads"))
    kinds = facts.get("layer_types")
    if isinstance(kinds, list) and index < len(kinds) and kinds[index] == "full_attention":
        width = int(facts.get("global_head_dim") or width)
        if facts.get("attention_k_eq_v"):
            key_heads = int(facts.get("num_global_key_value_heads") or key_heads)
    shared = index >= _size(facts, ("num_hidden_layers",), where) - int(facts.get("num_kv_shared_layers") or 0)
    return 0 if shared else 2 * key_heads * width, 2 * width


def _active_share(facts: Mapping[str, Any]) -> float:
    """Routed experts per token / experts; 1, which only overstates the cost, where the config uses unknown names."""
    used = [
        facts[k] for k in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk") if k in facts
    ]
    there = [facts[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in facts]
    known = used and there and isinstance(used[0], int) and isinstance(there[0], int) and 0 < used[0] <= there[0]
    return used[0] / there[0] if known else 1.0


def _window(index: int, facts: Mapping[str, Any]) -> int | None:
    window = facts.get("sliding_window")
    if windows := layer_windows(facts, facts["model_type"]):
        return windows[index]
    if facts["model_type"] not in _WINDOWED or not isinstance(window, int):
        return None
    pattern, kinds = facts.get("sliding_window_pattern"), facts.get("layer_types")
    if isinstance(kinds, list) and index < len(kinds):
        return window if kinds[index] == "sliding_attention" else None
    if isinstance(pattern, int) and pattern > 0:
        return window if (index + 1) % pattern else None
    return None


def _size(facts: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    for name in names:
        if isinstance(facts.get(name), int) and facts[name] > 0:
            return int(facts[name])
    raise CheckpointError(f"{where}: its config.json has no {names[0]}.")


def _memory(tensors: Iterable[Tensor]) -> int:
    return sum(t.memory for t in tensors)
