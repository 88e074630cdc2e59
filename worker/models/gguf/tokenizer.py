"""A GGUF file's tokenizer -> tokenizer.json and tokenizer_config.json of Hugging Face's `tokenizers`.

    Metadata --read_vocabulary--> Vocabulary --byte_level_bpe | sentencepiece_bpe--> Tokenizer
             --tokenizer_config--> special tokens, chat template

Two styles: `gpt2` (byte-level BPE with merges and one of several pre-tokenizers) and `llama` (SentencePiece BPE with
scores and byte fallback).
"""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.gguf.metadata import Metadata
from pomarium.worker.models.gguf.vocabulary import Kind, Vocabulary

_SPACE = "▁"  # SentencePiece's visible space

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


def _splits(*patterns: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _digits_then_gpt2() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_splits(_GPT2)]


_PRE_TOKENIZERS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "gpt-2": lambda: _splits(_GPT2),
    "llama-bpe": lambda: _splits(_LLAMA3),
    "llama-v3": lambda: _splits(_LLAMA3),
    "llama3": lambda: _splits(_LLAMA3),
    "qwen2": lambda: _splits(_QWEN2),
    "deepseek-r1-qwen": lambda: _splits(_QWEN2),
    "default": lambda: _splits(*_LLAMA_CPP_DEFAULT),
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama-v3", "llama3"}  # a pre-token that is in the vocabulary is not merged
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # text is normalised to NFC


def build_tokenizer(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """Raises UnsupportedError for an unknown tokenizer model or pre-tokenizer, CheckpointError for damaged data."""
    model = metadata.required("tokenizer.ggml.model", str)
    if model == "gpt2":
        tokenizer = byte_level_bpe(metadata, vocabulary)
    elif model == "llama":
        prefix = metadata.optional("tokenizer.ggml.add_space_prefix", bool)
        tokenizer = sentencepiece_bpe(metadata, vocabulary, space_prefix=True if prefix is None else prefix)
    else:
        raise UnsupportedError(f"{metadata.path}: tokenizer model {model!r} is not supported (only gpt2 and llama).")
    _add_special_tokens(tokenizer, vocabulary)
    _add_template(tokenizer, vocabulary)
    return tokenizer


def byte_level_bpe(metadata: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """GPT-2 style BPE. A file without `tokenizer.ggml.pre` gets llama.cpp's default pre-tokenizer."""
    pre = metadata.optional("tokenizer.ggml.pre", str) or "default"
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UnsupportedError(f"{metadata.path}: pre-tokenizer {pre!r} is not supported (only {known}).")
    merges = [tuple(merge.split(" ")) for merge in metadata.listed("tokenizer.ggml.merges", str) or []]
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    if any(len(merge) != 2 or merge[0] not in ids or merge[1] not in ids for merge in merges):
        raise CheckpointError(f"{metadata.path}: its tokenizer merges do not fit its vocabulary.")
    tokenizer = Tokenizer(_bpe(metadata, vocab=ids, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*_PRE_TOKENIZERS[pre](), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(metadata: Metadata, vocabulary: Vocabulary, *, space_prefix: bool) -> Tokenizer:
    """SentencePiece BPE with byte fallback.

    SentencePiece joins the neighbours whose joined piece has the best score; as BPE merges that is every split of a
    piece into two pieces, in order of falling score.
    """
    if vocabulary.scores is None:
        raise CheckpointError(f"{metadata.path} is incomplete: the key 'tokenizer.ggml.scores' is missing.")
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    merges = _merges(vocabulary)
    unknown = None if vocabulary.unknown_id is None else vocabulary.pieces[vocabulary.unknown_id]
    tokenizer = Tokenizer(
        _bpe(metadata, vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend(_SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    scores = vocabulary.scores or []
    normal = {vocabulary.pieces[i]: i for i in vocabulary.ids_of(Kind.NORMAL)}
    ranked = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = normal.get(piece[:cut]), normal.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], left, right, piece[:cut], piece[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _bpe(metadata: Metadata, **arguments: Any) -> models.BPE:
    try:
        return models.BPE(**arguments)
    except Exception as error:
        raise CheckpointError(f"{metadata.path}: its tokenizer does not fit together ({error}).") from error


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    control = vocabulary.ids_of(Kind.CONTROL, Kind.UNKNOWN)
    user = vocabulary.ids_of(Kind.USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(vocabulary.pieces[i], special=True, normalized=False) for i in control])
    tokenizer.add_tokens(
        # A piece with visible spaces is met only in normalised text.
        [AddedToken(vocabulary.pieces[i], special=False, normalized=_SPACE in vocabulary.pieces[i]) for i in user]
    )


def _add_template(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    bos = [vocabulary.bos_id] if vocabulary.add_bos and vocabulary.bos_id is not None else []
    eos = vocabulary.eos_ids[:1] if vocabulary.add_eos else []
    if not bos and not eos:
        return
    before, after = ([vocabulary.pieces[i] for i in ids] for ids in (bos, eos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{piece}:1" for piece in before), "$B:1", *(f"{piece}:1" for piece in after)],
        special_tokens=[(vocabulary.pieces[i], i) for i in dict.fromkeys(bos + eos)],
    )


def tokenizer_config(metadata: Metadata, vocabulary: Vocabulary, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json: special tokens, chat template, nothing that rewrites text."""
    named = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_ids[0] if vocabulary.eos_ids else None,
        "unk_token": vocabulary.unknown_id,
        "pad_token": vocabulary.padding_id,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: vocabulary.pieces[i] for name, i in named.items() if i is not None}
    template = metadata.optional("tokenizer.chat_template", str)
    return config | ({"chat_template": template} if template is not None else {})
