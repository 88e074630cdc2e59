"""Keys of config.json that change the mathematics and that nobody reads: refused by name.

    config --unread_key--> None, or the first key whose value mlx-lm's definition does not stand for

What decides is data. unread.json (made by tests/config_keys.py) has, for each family that transformers and mlx-lm
share, the keys of transformers' configuration class that mlx-lm's definition does not read, with transformers' default;
INERT are keys that change no logits of text. A value is of no harm if it is the default, empty, or one that families.py
says the definition computes. A key that transformers' class does not have either is no concern of ours, unless its name
is one by which some family changes its mathematics (_TELLING) and it has a value: trainers and quantisers add keys, and
none of these names.
"""

import json
import re
from collections.abc import Mapping, Set
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING

from pomarium.worker.models.forms.family import Config, Family

TABLE = Path(__file__).with_name("unread.json")

INERT = frozenset({
    # what a config says of itself
    "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "quantization",
    "quantization_config", "_name_or_path", "model_file",
    # which tokens are special, how many may be generated, what is returned
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "eod_token_id", "unk_token_id", "id2label",
    "label2id", "problem_type", "num_labels", "classifier_dropout", "is_decoder", "is_encoder_decoder", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "num_logits_to_keep", "use_cache",
    "tokenizer_class", "max_position_embeddings", "max_sequence_length", "max_seq_len", "model_max_length",
    "n_positions",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    # training
    "attention_dropout", "attn_pdrop", "aux_loss_alpha", "embd_pdrop", "emb_pdrop", "embedding_dropout",
    "hidden_dropout", "initializer_range", "input_jitter_noise", "pretraining_tp", "resid_pdrop", "residual_dropout",
    "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef",
    "seq_aux", "moe_router_aux_loss_coef", "w_init_variance_scale",
    "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",
    "time_step_init_scheme", "time_step_scale", "rescale_prenorm_residual",
    # how it is computed, not what
    "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "reorder_and_upcast_attn", "residual_in_fp32",
    "chunk_size_feed_forward", "chunk_size", "mamba_chunk_size", "ep_size", "use_associative_scan", "use_mamba_kernels",
    "use_mambapy", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "block_size", "moe_norm_min",
    # of towers and heads of multi-token prediction, which are not loaded
    "num_mtp_layers", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_layer_types", "mtp_mlp_layer_types",
    "vision_config", "audio_config", "image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id",
    "vision_end_token_id", "image_token_index", "video_token_index",
    # sizes, which the shapes of tensors tell, and a head of its own, whose tensor is there or not
    "tie_word_embeddings",
    "expand", "head_dim", "hidden_size", "intermediate_size", "linear_conv_kernel_dim", "linear_head_dim",
    "linear_num_heads", "mamba_expand", "n_inner", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "num_sliding_attention_heads", "conv1d_width", "vocab_size",
    # read by forms/rope.py and forms/windows.py
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings",
    "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern",
})  # fmt: skip
_TELLING = re.compile(
    r"soft_?cap|_multiplier$|^rope_|^rotary_|alibi|logits?_scal|^logit_scale|clip_qkv|^use_qk_norm$|^qk_(layer)?norm"
)


@cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """unread.json."""
    read: dict[str, dict[str, Any]] = json.loads(TABLE.read_bytes())
    return read


def definition_of(model_type: str) -> str | None:
    """The module of mlx_lm.models that serves `model_type`, None if there is none."""
    module: str = MODEL_REMAPPING.get(model_type, model_type)
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", module) or find_spec(f"mlx_lm.models.{module}") is None:
        return None
    return module


def unread_key(config: Config, model_type: str, family: Family, arguments: Set[str]) -> str | None:
    """The first key of `config` that changes the mathematics and that nobody reads.

    Args:
        arguments: what mlx-lm's definition takes from a config.
    """
    known = table().get(model_type, {})
    handled = family.renamed.keys() | family.handled
    for key, value in config.items():
        if key in INERT or _says_nothing(value):
            continue
        if key in family.computed:
            if not any(_equal(value, computed) for computed in family.computed[key]):
                return key
        elif key in known and key not in handled:
            if not _equal(value, known[key]) and not (value is False and known[key] is None):
                return key
        elif key not in arguments and key not in handled and _telling(key, value):
            return key
    return None


def _telling(key: str, value: Any) -> bool:
    neutral = value is False or (value in (0, 1) and not isinstance(value, bool))
    return _TELLING.search(key) is not None and not neutral


def _says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _equal(value: Any, computed: Any) -> bool:
    return bool(value == computed) and isinstance(value, bool) == isinstance(computed, bool)
