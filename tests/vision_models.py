"""Tiny checkpoints of the families that see, in the format in which they are released, and two references.

    transformers' torch model, random weights --write_seeing--> directory: weights, config.json, preprocessor, tokenizer
    directory --torch_logits, mlx_vlm_logits--> logits of tokens and tiles, float32

An image of up to 32 pixels a side is one tile of 16 or up to four and a small copy; a tile is four embeddings.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import TINY, write_tokenizer
from tokenizers import AddedToken, Tokenizer

Config = dict[str, Any]

TILE, LONGEST, PATCH, FACTOR = 16, 32, 4, 2
PER_TILE = (TILE // PATCH // FACTOR) ** 2
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
_ADDED = [IMAGE, FAKE, GLOBAL, "<end_of_utterance>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]
IMAGE_TOKEN, FAKE_TOKEN, GLOBAL_TOKEN = 128, 129, 130
VOCAB = 144

FAMILIES = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}

TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""As SmolVLM's."""

PREPROCESSOR: Config = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Idefics3ImageProcessor",
    "max_image_size": {"longest_edge": TILE},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": LONGEST},
}


def seeing_config(family: str) -> Config:
    """config.json as the releases have it."""
    text = {k: v for k, v in TINY["llama"].items() if k not in ("architectures", "head_dim")}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": FACTOR,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": VOCAB,
        "torch_dtype": "float32",
        "text_config": {**text, "vocab_size": VOCAB, "tie_word_embeddings": False, "qk_layer_norms": False},
        "vision_config": {
            "model_type": family if family == "idefics3" else "smolvlm_vision",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_channels": 3,
            "image_size": TILE,
            "patch_size": PATCH,
        },
    }


def write_seeing(family: str, directory: Path, **changes: Any) -> Path:
    """Write a release of `family`, `changes` laid over its config; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**seeing_config(family), **changes}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    model = _torch_model(directory)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 2.0 if name.endswith("text_model.norm.weight") else 0.2
            parameter += spread * torch.randn_like(parameter)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _ADDED])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}, indent=1))
    return directory


def released(family: str, folder: Path) -> Path:
    """`write_seeing` in a folder that a module's tests share, once."""
    directory = folder / family
    return directory if directory.exists() else write_seeing(family, directory)


def _torch_model(directory: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(directory)
    config._attn_implementation = "eager"
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@cache
def _torch_loaded(directory: Path) -> torch.nn.Module:
    model = _torch_model(directory)
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model


@cache
def _mlx_vlm_loaded(directory: Path) -> Any:
    from mlx_vlm.models.idefics3 import Model, ModelConfig, TextConfig, VisionConfig

    config = json.loads((directory / "config.json").read_text())
    text, vision = TextConfig.from_dict(config["text_config"]), VisionConfig.from_dict(config["vision_config"])
    model = Model(ModelConfig(text, vision, "idefics3", scale_factor=FACTOR, image_token_id=IMAGE_TOKEN))
    weights = model.sanitize(dict(mx.load(str(directory / "model.safetensors"))))
    model.load_weights(list(model.vision_model.sanitize(weights).items()), strict=True)
    return model


def as_floats(tiles: np.ndarray) -> np.ndarray:
    """Tiles uint8 as the releases' processors hand them on, float32."""
    return ((tiles.astype(np.float32) / 255) - 0.5) / 0.5


def torch_logits(directory: Path, tokens: Sequence[int], tiles: np.ndarray) -> np.ndarray:
    """transformers' logits (T, VOCAB) of a prompt whose images have the `tiles` uint8 (N, 3, TILE, TILE), if any."""
    seen = {"pixel_values": torch.from_numpy(as_floats(tiles))[None]} if len(tiles) else {}
    with torch.no_grad():
        output = _torch_loaded(directory)(input_ids=torch.tensor([list(tokens)]), **seen)
    return np.asarray(output.logits[0].float().numpy())


def mlx_vlm_logits(directory: Path, tokens: Sequence[int], tiles: np.ndarray) -> np.ndarray:
    """mlx-vlm's, likewise."""
    model = _mlx_vlm_loaded(directory)
    pixels = mx.array(as_floats(tiles))[None] if len(tiles) else None
    return np.array(model(mx.array([list(tokens)]), pixels).logits[0])


def expanded(rows: int, columns: int, tokens: dict[str, int]) -> list[int]:
    """What stands for an image of so many tiles in a prompt (0, 0: one tile), as transformers' Idefics3Processor has
    it. tokens: the tokenizer's vocabulary; a line's end is its `<unk>`."""
    found: list[int] = []
    for row in range(rows):
        for column in range(columns):
            found += [FAKE_TOKEN, tokens[f"<row_{row + 1}_col_{column + 1}>"], *[IMAGE_TOKEN] * PER_TILE]
        found += [0]
    return [*found, *[0] * (rows > 0), FAKE_TOKEN, GLOBAL_TOKEN, *[IMAGE_TOKEN] * PER_TILE, FAKE_TOKEN]


def tokens_of(directory: Path) -> dict[str, int]:
    """The tokenizer's vocabulary."""
    return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()


def released_tiles(image: Image.Image) -> tuple[np.ndarray, Any, Any]:
    """transformers' tiles uint8 (1, N, 3, TILE, TILE) of an image, and how many rows and columns of them it has."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": LONGEST},
        max_image_size={"longest_edge": TILE},
        do_rescale=False,
        do_normalize=False,
        do_pad=False,
        return_row_col_info=True,
    )
    found = processor([[image]])
    return np.asarray(found["pixel_values"]), found["rows"], found["cols"]
