"""YAML text -> plain data and the line of every field, so that an error can name both.

    text --parse--> Document(data, lines);  lines[("macs", 1, "memory")] == 14

Every scalar stays text as it was written: 22:00 is no base-60 number, `no` no boolean, and what a field means is the
schema's to say. Duplicate keys and aliases, which YAML would resolve silently, are errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

Path = tuple[str | int, ...]


class DocumentError(ValueError):
    """What is wrong, as half a sentence, and the line (from 1)."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


@dataclass(frozen=True)
class Document:
    """data: of dicts, lists and str; an empty document is {}. lines: the line of each key or list item, from 1."""

    data: Any
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """The line of `path`, or of the nearest field around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(text: str) -> Document:
    """Raises DocumentError."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(mark.line + 1 if mark else 1, f"not valid YAML ({said})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise DocumentError(1, f"not valid YAML ({' '.join(str(error).split())})") from error
    except RecursionError:
        raise DocumentError(1, "nested too deeply") from None
    if node is None:
        return Document({})
    lines: dict[Path, int] = {}
    return Document(_plain(node, (), lines, set()), lines)


def _plain(node: Any, path: Path, lines: dict[Path, int], seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in seen:
        raise DocumentError(line, "uses a YAML alias (*name); write the value out")
    seen.add(id(node))
    lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, index), lines, seen) for index, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key, value in node.value:
        at = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise DocumentError(at, "has a key that is not a word")
        if key.value in found:
            raise DocumentError(at, f"has the key {key.value!r} twice")
        lines[(*path, key.value)] = at
        found[key.value] = _plain(value, (*path, key.value), lines, seen)
    return found
