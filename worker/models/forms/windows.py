"""Windows that transformers' definitions have and mlx-lm's do not: which layers attend to how many tokens.

    config --layer_windows--> a window or None per layer --window_layers.keep_windows--> the built model

mlx-lm attends to everything in the layers of Mistral, Phi-3, StarCoder 2, Gemma 2 and others whose config.json has a
window. Of a window that is no shorter than the longest context nothing can be seen, and it is left out.
"""

from pomarium.worker.models.forms.families import FAMILIES
from pomarium.worker.models.forms.family import Config, Family

SLIDING = "sliding_attention"
_ALL_LAYERS = frozenset({"mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
_SWITCHED = frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
"""`use_sliding_window` says whether the window is used at all."""


def layer_windows(config: Config, model_type: str) -> tuple[int | None, ...]:
    """Per layer the number of tokens it attends to, its own among them.

    () if no layer has a window of effect, and for families in whose definition mlx-lm applies it.
    """
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers")
    if not FAMILIES.get(model_type, Family()).windowed or not isinstance(window, int) or not isinstance(layers, int):
        return ()
    if model_type in _SWITCHED and not config.get("use_sliding_window"):
        return ()
    longest = config.get("max_position_embeddings")
    if (isinstance(longest, int) and window >= longest) or window <= 0:
        return ()
    windows = tuple(window if slides else None for slides in _slide(config, model_type, layers))
    return windows if any(windows) else ()


def _slide(config: Config, model_type: str, layers: int) -> list[bool]:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return [kind == SLIDING for kind in kinds]
    if model_type in _ALL_LAYERS or model_type == "qwen3_moe":
        return [True] * layers
    if model_type == "gemma2":
        return [index % 2 == 0 for index in range(layers)]
    first = int(config.get("max_window_layers", layers))
    if model_type == "qwen2_moe":
        return [index % 2 == 0 and index < first for index in range(layers)]
    return [index >= first for index in range(layers)]
