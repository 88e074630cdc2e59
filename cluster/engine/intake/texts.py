"""How much text a request has, and how much of it a model's tokenizer is asked to read. Pure functions.

A tokenizer reads about a megabyte a second, and reads all of a text before it is found to be longer than the model.
"""

from collections.abc import Mapping
from typing import Any

CHARS_PER_TOKEN = 16
"""Characters of text for each token of a model's length: English has 4, indented code about 8."""

LEAST_CHARS = 1_000_000
"""Read for any model, however short: about a second."""


def limit_of(max_model_len: int) -> int:
    """Characters of one request that are read for a model of so many tokens where the user says nothing."""
    return max(LEAST_CHARS, CHARS_PER_TOKEN * max_model_len)


def refusal(fields: Mapping[str, Any], limit: int, body_chars: int, other_chars: int = 0) -> str | None:
    """Why the request is not read; None: it has at most `limit` characters and token ids.

    Args:
        body_chars: length of the body that `fields` were read from. It has no less than they have.
        other_chars: of them that no tokenizer reads.
    """
    if body_chars <= limit or (size := size_of(fields) - other_chars) <= limit:
        return None
    return (
        f"The request has {size} characters and token ids: {limit} are the most that are read for this model. "
        "Shorten it, or raise POMARIUM_MAX_REQUEST_CHARS."
    )


def size_of(value: Any) -> int:
    """Characters of all text in parsed JSON, keys included, and one for each number in a list. Does not recurse."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            size += sum(map(len, item))
            waiting.extend(item.values())
        elif isinstance(item, list):
            size += len(item)
            waiting.extend(inner for inner in item if isinstance(inner, str | dict | list))
    return size
