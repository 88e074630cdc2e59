"""The vocabulary of a GGUF file: pieces, their kinds and scores, and which ids are special.

Piece kinds are SentencePiece's (sentencepiece_model.proto, Type), which llama.cpp uses for every tokenizer.
"""

from dataclasses import dataclass
from enum import IntEnum

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.gguf.metadata import Metadata

_KEY = "tokenizer.ggml."
_TURN_ENDS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>"})
_DOCUMENT_ENDS = frozenset({"<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>"})
"""Names that end an answer in every family that has them. A file declares one end, at most one for turns (eot) and one
for messages (eom), while releases name more in generation_config.json, which GGUF does not carry."""


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Attributes:
    pieces: unique strings, one per id. kinds: one per piece. scores: one per piece, or None (BPE files).
    eos_ids: every id that ends an answer, the declared one first.
    """

    pieces: list[str]
    kinds: list[int]
    scores: list[float] | None
    bos_id: int | None
    eos_ids: list[int]
    unknown_id: int | None
    padding_id: int | None
    add_bos: bool
    add_eos: bool

    def ids_of(self, *kinds: Kind) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]


def _ends(pieces: list[str], kinds: list[int]) -> list[int]:
    """Ids of the tokens that end a turn, then of those that end a document.

    Files exist whose marks of turns are user-defined tokens. The ends of documents must be control tokens: Gemma's
    vocabulary has HTML's </s> as a user-defined one.
    """
    marks = {Kind.CONTROL, Kind.USER_DEFINED}
    turns = [i for i, piece in enumerate(pieces) if piece in _TURN_ENDS and kinds[i] in marks]
    documents = [i for i, piece in enumerate(pieces) if piece in _DOCUMENT_ENDS and kinds[i] == Kind.CONTROL]
    return turns + documents


def read_vocabulary(metadata: Metadata, vocab_size: int) -> Vocabulary:
    """Read and check the tokenizer keys; pieces beyond the embedding's `vocab_size` rows are an error.

    Raises:
        CheckpointError: keys are missing, lists differ in length, pieces repeat or an id is out of range.
    """
    pieces = metadata.listed(_KEY + "tokens", str)
    if not pieces:
        raise CheckpointError(f"{metadata.path} is incomplete: the key 'tokenizer.ggml.tokens' is missing.")
    kinds = metadata.listed(_KEY + "token_type", int)
    scores = metadata.listed(_KEY + "scores", float)
    kinds = [Kind.NORMAL] * len(pieces) if kinds is None else kinds
    if len(kinds) != len(pieces) or (scores is not None and len(scores) != len(pieces)) or len(pieces) > vocab_size:
        raise CheckpointError(f"{metadata.path}: its lists of tokens, types and scores do not fit each other.")
    if len(set(pieces)) != len(pieces):
        raise CheckpointError(f"{metadata.path}: its vocabulary names a token twice.")

    def identifier(name: str) -> int | None:
        value = metadata.optional(f"{_KEY}{name}_token_id", int)
        if value is not None and not 0 <= value < len(pieces):
            raise CheckpointError(f"{metadata.path}: its {name} token id {value} is not in the vocabulary.")
        return value

    eos_ids = [identifier("eos"), identifier("eot"), identifier("eom"), *_ends(pieces, kinds)]
    is_sentencepiece = metadata.required(_KEY + "model", str) == "llama"
    add_bos = metadata.optional(_KEY + "add_bos_token", bool)
    return Vocabulary(
        pieces=pieces,
        kinds=kinds,
        scores=scores,
        bos_id=identifier("bos"),
        eos_ids=list(dict.fromkeys(i for i in eos_ids if i is not None)),
        unknown_id=identifier("unknown"),
        padding_id=identifier("padding"),
        add_bos=is_sentencepiece if add_bos is None else add_bos,
        add_eos=metadata.optional(_KEY + "add_eos_token", bool) or False,
    )
