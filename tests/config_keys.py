"""Keys of transformers' configuration classes that mlx-lm's definitions do not read: worker/models/forms/unread.json.

    transformers' class (fields, defaults) - what the definition's source mentions - inert keys --table--> unread.json

    python tests/config_keys.py     rewrites the file, after a change of either package

A key counts as read where the source of the mlx-lm module, or of a module of models that it imports, takes an attribute
or an entry of that name. Only text models: of a wrapper, its `text_config`.
"""

import ast
import dataclasses
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pomarium.worker.models.forms.unread import INERT, TABLE, definition_of

SHARED_CODE = {"base", "cache", "rope_utils", "switch_layers", "ssm", "mla", "pipeline", "activations", "gated_delta"}


BY_THEIR_TEXT = {"gemma3", "gemma4", "gemma4_unified", "kimi_k25", "llava", "mistral3", "pixtral"}
"""Wrappers in mlx-lm that leave the text model to the definition of its own model type."""


def shared_families() -> tuple[str, ...]:
    """Model types that both packages know."""
    return tuple(sorted(name for name in CONFIG_MAPPING if definition_of(name) and name not in BY_THEIR_TEXT))


@cache
def mentioned(module: str) -> frozenset[str]:
    """Names that the source of mlx_lm.models.`module` takes as an attribute or an entry, its relatives' included."""
    spec = find_spec(f"mlx_lm.models.{module}")
    assert spec is not None
    assert spec.origin is not None
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            for name in modules:
                if name not in SHARED_CODE:
                    names |= mentioned(name)
    return frozenset(names)


def unread(model_type: str) -> dict[str, Any]:
    """Key -> transformers' default, of the keys that the definition of `model_type` does not read."""
    module = definition_of(model_type)
    assert module is not None
    configuration = CONFIG_MAPPING[model_type]
    text = configuration.sub_configs.get("text_config", configuration)
    configuration = text if dataclasses.is_dataclass(text) else configuration
    fields = {field.name: _default(field) for field in dataclasses.fields(configuration)}
    names = sorted(fields.keys() - INERT - mentioned(module))
    return {name: json.loads(json.dumps(fields[name], default=str)) for name in names}


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def table() -> dict[str, dict[str, Any]]:
    return {family: unread(family) for family in shared_families()}


def text() -> str:
    """The file's content: one family per line."""
    lines = [f" {json.dumps(family)}: {json.dumps(keys)}" for family, keys in table().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(text())
    print(f"{TABLE}: {len(table())} families")
