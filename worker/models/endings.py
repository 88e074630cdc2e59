"""Where a model's answers end: the one place that says so, from all that a folder declares.

    generation_config.json, config.json, its text_config, tokenizer --endings_of--> Endings: ids, and who names each

No single source is enough. Releases write `eos_token_id` into either file, or one id into each; where
generation_config.json holds sampling settings alone, config.json counts (mlx_lm/utils.py, load_config); the tokenizer's
own end token closes documents where another closes turns. What a GGUF file knows was written into these files when it
was converted (gguf/vocabulary.py).

config.json is believed with one reserve: an id that is an ordinary piece of text in the tokenizer is left out where
another source names an end. Configurations carry their class's default, 2 for Llama's, into models whose vocabulary has
a "#" or the like in that place.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from pomarium.worker.errors import CheckpointError

KEY = "eos_token_id"
TOKENIZER = "tokenizer"
GENERATION = "generation_config.json"
CONFIG = "config.json"
TEXT_CONFIG = "config.json's text_config"


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer knows of ends.

    Attributes:
        end: the id of its end token.
        marks: ids of tokens that no text spells: special and added ones.
    """

    end: int | None
    marks: Set[int]


@dataclass(frozen=True)
class Endings:
    """Attributes:
    sources: id of each token that ends an answer -> who names it, the most explicit one first.
    """

    sources: Mapping[int, tuple[str, ...]]

    @property
    def token_ids(self) -> list[int]:
        """Ascending."""
        return sorted(self.sources)

    def described(self, name: Callable[[int], str]) -> str:
        """For a line of the log. `name`: the text of a token."""
        if not self.sources:
            return "no end token is named: answers run to max_tokens or a stop string"
        found = (f"{name(token)} ({token}: {', '.join(said)})" for token, said in self.sources.items())
        return f"answers end at {'; '.join(found)}"


def endings_of(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: TokenizerFacts | None, vocab_size: int
) -> Endings:
    """The tokens that end an answer, of `vocab_size` in all; ids beyond cannot come and are left out.

    Args:
        generation, config: the files' contents, empty where there is none.
        tokenizer: None if none is loaded.

    Raises:
        CheckpointError: a file names something that is neither an id nor a list of ids.
    """
    text = config.get("text_config")
    declared = {GENERATION: _ids(generation, GENERATION)}
    declared[TOKENIZER] = [] if tokenizer is None or tokenizer.end is None else [tokenizer.end]
    sure = {token for tokens in declared.values() for token in tokens}
    for source, content in ((CONFIG, config), (TEXT_CONFIG, text if isinstance(text, Mapping) else {})):
        tokens = _ids(content, source)
        if sure and tokenizer is not None:
            tokens = [token for token in tokens if token in tokenizer.marks or token in sure]
        declared[source] = tokens
    sources: dict[int, tuple[str, ...]] = {}
    for source, tokens in declared.items():
        for token in tokens:
            if 0 <= token < vocab_size:
                sources[token] = (*sources.get(token, ()), source)
    return Endings(sources)


def _ids(content: Mapping[str, Any], source: str) -> list[int]:
    value = content.get(KEY)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in tokens):
        raise CheckpointError(f"{source}: its {KEY} is {value!r}, which is neither a token id nor a list of them.")
    return list(dict.fromkeys(tokens))
