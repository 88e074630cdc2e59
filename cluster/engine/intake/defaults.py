"""What vLLM leaves open or lets be very large, decided once per engine; what the user set stays as it is."""

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MAX_N = ("VLLM_MAX_N_SEQUENCES", "128")
"""Answers to one prompt (`n`): 128 is OpenAI's bound, vLLM's own is 16,384."""

STRICT_TOOLS = "VLLM_ENFORCE_STRICT_TOOL_CALLING"

XGRAMMAR, GUIDANCE = "xgrammar", "guidance"


def complete(config: "VllmConfig", environ: MutableMapping[str, str]) -> None:
    """Fill in the compiler of structured output, and vLLM's variables that bound a request.

    With `auto` the first request decides which compiler an engine has, and later ones fail that another had checked.
    llguidance compiles in milliseconds, bounds its own work and says what it cannot do; xgrammar takes seconds for
    `maxLength: 1000`. What only xgrammar knows are structural tags, with which GPT-OSS asks for any form and vLLM for
    calls of tools where it is to enforce their schemas; and Mistral's own tokenizers.
    """
    outputs, model = config.structured_outputs_config, config.model_config
    if outputs.backend == "auto":
        needs_tags = model.hf_config.model_type == "gpt_oss" or model.tokenizer_mode == "mistral"
        outputs.backend = XGRAMMAR if needs_tags else GUIDANCE
    if outputs.backend != XGRAMMAR:
        environ.setdefault(STRICT_TOOLS, "0")
    environ.setdefault(*MAX_N)
