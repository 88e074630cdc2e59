"""Tokenizers rebuilt from GGUF metadata: SmolLM2's own, the pre-tokenizer variants, and SentencePiece's."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models import embedded
from pomarium.worker.models.gguf.metadata import Metadata
from pomarium.worker.models.gguf.reader import read_header
from pomarium.worker.models.gguf.tokenizer import build_tokenizer, tokenizer_config
from pomarium.worker.models.gguf.vocabulary import read_vocabulary

STRINGS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # twice\n\n\tif x: pass",
    "1234567890 3.14159 0x7f 2026-11-22",
    "Grüße aus Köln, naïve café, łódź",
    "日本語のテキストと中文和한국어",
    "Привет, мир! שלום עולם مرحبا",
    "emoji 🍎🍏👩‍🚀 and math ∑∫√ ≠ ≤",
    "   leading and trailing   ",
    "\n\n\n  \t mixed \r\n whitespace",
    "don't we'll I'M THEY'RE o'clock",
    "a",
    " ",
    "\x00\x01\x7f",
]


def _build(values: dict[str, Any]) -> Tokenizer:
    metadata = Metadata(Path("m.gguf"), values)
    return build_tokenizer(metadata, read_vocabulary(metadata, len(values["tokenizer.ggml.tokens"])))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return _build(dict(read_header(embedded.gguf_file()).metadata))


@pytest.mark.parametrize("text", STRINGS)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text).ids, skip_special_tokens=False) == text


# SmolLM2's vocabulary lacks some bytes: a few control characters and those of code points from U+40000.
@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=60))
@settings(max_examples=100, deadline=2000)
def test_smollm2_round_trip_of_any_text(text: str) -> None:
    tokenizer = _cached_smollm2()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


_HELD: list[Tokenizer] = []


def _cached_smollm2() -> Tokenizer:
    if not _HELD:
        _HELD.append(_build(dict(read_header(embedded.gguf_file()).metadata)))
    return _HELD[0]


def test_smollm2_ids(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    assert smollm2.encode("The capital of France").tokens == ["The", "Ġcapital", "Ġof", "ĠFrance"]
    assert smollm2.encode("2026").tokens == ["2", "0", "2", "6"]


def test_smollm2_through_transformers(tmp_path: Path) -> None:
    metadata = Metadata(Path("m.gguf"), read_header(embedded.gguf_file()).metadata)
    vocabulary = read_vocabulary(metadata, 49152)
    build_tokenizer(metadata, vocabulary).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(metadata, vocabulary, 8192)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        assert tokenizer(text)["input_ids"] == _cached_smollm2().encode(text).ids
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_id == 2
    assert vocabulary.eos_ids == [2, 0]


def _bytes_vocabulary(pre: str | None, **values: Any) -> dict[str, Any]:
    """A BPE vocabulary of single bytes, so that tokens show where the pre-tokenizer cut nothing together."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [*sorted(ByteLevel.alphabet()), "12", "ab", "<s>"]
    named = {} if pre is None else {"tokenizer.ggml.pre": pre}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [1] * (len(pieces) - 1) + [3],
        "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.ggml.bos_token_id": len(pieces) - 1,
        "tokenizer.ggml.eos_token_id": len(pieces) - 1,
        **named,
        **values,
    }


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["Hi", "!", "Ġ", "1", "2", "3", "4", "ĠI", "'m", "ĊĊ"]),
        ("gpt-2", ["Hi", "!", "Ġ1234", "ĠI", "'m", "ĊĊ"]),
        ("llama-bpe", ["Hi", "!", "Ġ", "123", "4", "ĠI", "'m", "ĊĊ"]),
        ("qwen2", ["Hi", "!", "Ġ", "1", "2", "3", "4", "ĠI", "'m", "ĊĊ"]),
        (None, ["Hi", "!", "Ġ", "123", "4", "ĠI", "'", "m", "ĊĊ"]),
    ],
)
def test_pre_tokenizers_cut_where_they_should(pre: str | None, words: list[str]) -> None:
    tokenizer = _build(_bytes_vocabulary(pre))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("Hi! 1234 I'm\n\n")
    assert [word for word, _ in cut] == words


@pytest.mark.parametrize(
    ("special", "declared", "ends"),
    [
        (
            {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3},
            {"eos": "<|im_end|>"},
            ["<|im_end|>", "<|endoftext|>"],
        ),
        (
            {"<|end_of_text|>": 3, "<|eom_id|>": 3, "<|eot_id|>": 3, "<|eoh|>": 3},
            {"eos": "<|eot_id|>", "eom": "<|eom_id|>"},
            ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
        ),
        ({"<eos>": 3, "<end_of_turn>": 4, "</s>": 4}, {"eos": "<eos>"}, ["<eos>", "<end_of_turn>"]),
        ({"<bye>": 3, "</s>": 3}, {"eot": "<bye>"}, ["<bye>", "</s>"]),
        ({"<|im_end|>": 1}, {"eos": "ab"}, ["ab"]),
    ],
    ids=["qwen2.5", "llama3", "gemma3", "own name", "ordinary text"],
)
def test_every_token_that_ends_an_answer(special: dict[str, int], declared: dict[str, str], ends: list[str]) -> None:
    values = _bytes_vocabulary("qwen2")
    del values["tokenizer.ggml.eos_token_id"]
    pieces = [*values["tokenizer.ggml.tokens"], *special]
    values["tokenizer.ggml.tokens"] = pieces
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], *special.values()]
    values |= {f"tokenizer.ggml.{name}_token_id": pieces.index(piece) for name, piece in declared.items()}
    found = read_vocabulary(Metadata(Path("m.gguf"), values), len(pieces))
    assert [pieces[token] for token in found.eos_ids] == ends


def test_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="pre-tokenizer 'tekken'"):
        _build(_bytes_vocabulary("tekken"))
    with pytest.raises(UnsupportedError, match="tokenizer model 'bert'"):
        _build(_bytes_vocabulary("gpt-2") | {"tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize(
    "damage",
    [
        {"tokenizer.ggml.merges": ["1 2", "no merge"]},
        {"tokenizer.ggml.merges": ["1"]},
        {"tokenizer.ggml.merges": ["1 a"]},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.bos_token_id": 100000},
        {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]},
        {"tokenizer.ggml.add_bos_token": "yes"},
    ],
)
def test_damaged_vocabularies(damage: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        _build(_bytes_vocabulary("gpt-2") | damage)


def test_bos_and_eos_are_added_when_the_file_says_so() -> None:
    values = _bytes_vocabulary("gpt-2")
    assert _build(values).encode("ab").tokens == ["ab"]
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert _build(values | both).encode("ab").tokens == ["<s>", "ab", "<s>"]
    assert _build(values | both).encode("ab", add_special_tokens=False).tokens == ["ab"]


def _train(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    corpus = [line for line in STRINGS[:7] if line.isprintable()] * 20
    corpus += ["the cat sat on the mat and the dog ran to the other cat", "hello world hello there"] * 30
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=["<tag>"],
        minloglevel=2,
        num_threads=1,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _metadata_of(sp: sentencepiece.SentencePieceProcessor, prefix: bool) -> dict[str, Any]:
    kinds = []
    for i in range(sp.vocab_size()):
        if sp.IsUnknown(i):
            kinds.append(2)
        elif sp.IsControl(i):
            kinds.append(3)
        elif sp.IsByte(i):
            kinds.append(6)
        else:
            kinds.append(4 if sp.IdToPiece(i) == "<tag>" else 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.IdToPiece(i) for i in range(sp.vocab_size())],
        "tokenizer.ggml.scores": [float(sp.GetScore(i)) for i in range(sp.vocab_size())],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def pair(request: pytest.FixtureRequest) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    sp = _train(request.param)
    return sp, _build(_metadata_of(sp, request.param))


@pytest.mark.parametrize("text", [*STRINGS, "the cat the cat", "hello", "  the  other  world"])
def test_sentencepiece_encodes_alike(pair: tuple[Any, Tokenizer], text: str) -> None:
    sp, tokenizer = pair
    assert tokenizer.encode(text).ids == sp.encode(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == sp.decode(sp.encode(text))


@given(st.text(st.sampled_from("the catsodgrnél 12\n.日🍎"), max_size=40))
@settings(max_examples=200, deadline=2000)
def test_sentencepiece_encodes_any_text_alike(pair: tuple[Any, Tokenizer], text: str) -> None:
    sp, tokenizer = pair
    assert tokenizer.encode(text).ids == sp.encode(text)


def test_sentencepiece_bos_is_on_by_default() -> None:
    sp = _train(True)
    values = _metadata_of(sp, True)
    del values["tokenizer.ggml.add_bos_token"]
    assert _build(values).encode("the cat").ids == [sp.bos_id(), *sp.encode("the cat")]
