"""Prompts of an exact number of tokens that mean the same as text and as token ids, so that every system gets the same.

They are random common words, each of which is one token with its leading space: nobody's cache knows them, and the
tokenizer cannot merge across them. `Prompts` is seeded, and never gives the same prompt twice.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

_WORD = re.compile(r" [a-z]{3,8}")


@dataclass(frozen=True)
class Prompt:
    """One prompt, as text and as the token ids of that text."""

    text: str
    token_ids: tuple[int, ...]


class Prompts:
    """Source of prompts for the tokenizer in `directory`."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        words = (self._tokenizer.decode([token_id]) for token_id in range(self._tokenizer.get_vocab_size()))
        self._words = sorted({word for word in words if _WORD.fullmatch(word)})
        self._random = random.Random(seed)

    def make(self, tokens: int, prefix: Prompt | None = None) -> Prompt:
        """A prompt of `tokens` tokens, which begins with `prefix`.

        Raises:
            ValueError: if the tokenizer makes another number of tokens of it.
        """
        start = "" if prefix is None else prefix.text
        count = tokens - (0 if prefix is None else len(prefix.token_ids))
        text = start + "".join(self._random.choices(self._words, k=count))
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if len(token_ids) != tokens:
            raise ValueError(f"wanted {tokens} tokens, the tokenizer made {len(token_ids)}")
        return Prompt(text, token_ids)
