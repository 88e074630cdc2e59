"""What a model's folder says of conversations: its chat template, and the tokens that no text spells.

    chat_template.jinja, else tokenizer_config.json, else chat_template.json --+
    tokenizer.json, tokenizer_config.json: added tokens -----------------------+--read--> ChatFacts

The files are read in the order of transformers (tokenization_utils_base.py), without building a tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models import chat_template
from pomarium.worker.models.json_files import read_object

JINJA = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
FOR_TOOLS = "tool_use"
"""The name of a template for requests with tools, where a model has several."""
ORDINARY = "default"


@dataclass(frozen=True)
class ChatFacts:
    """Attributes:
    model_type: as config.json has it.
    template: of ordinary requests; None: there is none. tool_template: of requests with tools.
    tokens: special and added ones.
    """

    model_type: str
    template: str | None
    tool_template: str | None
    tokens: frozenset[str]


class Opening(Enum):
    """How a prompt leaves the place where a model thinks."""

    OPEN = "the prompt begins to think, and the answer goes on with it"
    CLOSED = "the prompt has ended it: there is none"
    FREE = "the prompt says nothing, and the model decides"


def read(folder: Path, model_type: str) -> ChatFacts:
    """The facts of a model's folder.

    Raises:
        CheckpointError: a file is not valid JSON, or holds something else than it should.
    """
    config = read_object(folder / TOKENIZER_CONFIG)
    templates = _templates(folder, config)
    ordinary = templates.get(ORDINARY)
    added = read_object(folder / TOKENIZER).get("added_tokens")
    decoder = config.get("added_tokens_decoder")
    entries = [*(added if isinstance(added, list) else ()), *(decoder.values() if isinstance(decoder, dict) else ())]
    tokens = {str(entry.get("content")) for entry in entries if isinstance(entry, dict)}
    return ChatFacts(model_type, ordinary, templates.get(FOR_TOOLS, ordinary), frozenset(tokens))


def opening(template: str, start: str, end: str) -> Opening | None:
    """How `template` leaves thinking between `start` and `end`, where a request says nothing of it. None: a question
    and nothing else cannot be rendered.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    question = [[{"role": "user", "content": "?"}]]
    texts = []
    for asks in (False, True):
        try:
            rendered, _ = render_jinja_template(
                question, chat_template=template, add_generation_prompt=asks, bos_token="", eos_token=""
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError):
            return None
        texts.append(str(rendered[0]))
    if not texts[1].startswith(texts[0]):
        return None
    asked = texts[1].removeprefix(texts[0])
    if asked.rfind(start) > asked.rfind(end):
        return Opening.OPEN
    return Opening.CLOSED if end in asked else Opening.FREE


def _templates(folder: Path, config: Mapping[str, Any]) -> Mapping[str, str]:
    """By name."""
    file = folder / JINJA
    if file.is_file():
        try:
            return {ORDINARY: file.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8: {error}.") from error
    source = config if config.get("chat_template") else read_object(folder / chat_template.FILE)
    if not source:
        return {}
    found = chat_template.template_of(source)
    return {ORDINARY: found} if isinstance(found, str) else found
