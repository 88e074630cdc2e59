"""chat_template.json: where releases put a chat template that is neither in tokenizer_config.json nor a .jinja file.

transformers reads that file for processors only (transformers/processing_utils.py), so that a text model would be left
without a template.
"""

from collections.abc import Mapping
from typing import Any

from pomarium.worker.errors import CheckpointError

FILE = "chat_template.json"


def template_of(content: Mapping[str, Any]) -> str | dict[str, str]:
    """The template in the file's `content`: one, or several by name, as tokenizer_config.json may have them.

    Raises:
        CheckpointError: the file holds something else.
    """
    template = content.get("chat_template")
    if isinstance(template, str):
        return template
    entries = template if isinstance(template, list) else []
    named = {e.get("name"): e.get("template") for e in entries if isinstance(e, Mapping)}
    if not named or not all(isinstance(name, str) and isinstance(text, str) for name, text in named.items()):
        raise CheckpointError(f'{FILE} should hold {{"chat_template": "..."}}; correct it or delete it.')
    return {str(name): str(text) for name, text in named.items()}
