"""GGUF headers: whatever the bytes, the answer is a model or one sentence; never a hang, never a wild allocation."""

import struct
import tempfile
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import write_gguf

from pomarium.worker.errors import CheckpointError, PomariumError, UnsupportedError
from pomarium.worker.models.gguf.convert import convert
from pomarium.worker.models.gguf.reader import read_header

QUICK = settings(max_examples=60, deadline=4000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def valid() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        write_gguf("llama", path, Kind.Q4_0, num_hidden_layers=1)
        return path.read_bytes()


def _attempt(content: bytes) -> PomariumError | None:
    with tempfile.TemporaryDirectory() as folder:
        path, directory = Path(folder) / "m.gguf", Path(folder) / "out"
        path.write_bytes(content)
        directory.mkdir()
        try:
            convert(path, directory)
        except PomariumError as error:
            return error
    return None


def _header_end(content: bytes) -> int:
    return content.index(b"blk.0.ffn_up.weight") + 200


def test_reads_what_the_gguf_package_reads(valid: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(valid)
    ours, theirs = read_header(tmp_path / "m.gguf"), GGUFReader(tmp_path / "m.gguf")
    for key, value in ours.metadata.items():
        assert value == theirs.fields[key].contents(), key
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert (own.offset, own.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert own.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert ours.raw(tensor.name).tobytes() == tensor.data.tobytes()


def test_the_valid_file_converts(valid: bytes) -> None:
    assert _attempt(valid) is None


@given(cut=st.floats(0, 1, exclude_max=True))
@QUICK
def test_truncated_anywhere(valid: bytes, cut: float) -> None:
    assert isinstance(_attempt(valid[: int(cut * len(valid))]), CheckpointError)


@given(data=st.data())
@QUICK
def test_damaged_anywhere_in_the_header(valid: bytes, data: st.DataObject) -> None:
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, _header_end(valid)))
        content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    _attempt(bytes(content))  # any other exception fails the test


@given(at=st.sampled_from([8, 16]), count=st.integers(2**20, 2**64 - 1))
@QUICK
def test_big_counts(valid: bytes, at: int, count: int) -> None:
    content = valid[:at] + struct.pack("<Q", count) + valid[at + 8 :]
    assert isinstance(_attempt(content), PomariumError)


@given(st.binary(max_size=400))
@QUICK
def test_arbitrary_bytes(content: bytes) -> None:
    assert isinstance(_attempt(content), CheckpointError)
    assert isinstance(_attempt(b"GGUF" + struct.pack("<I", 3) + content), PomariumError)


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        (b"GGUF\x03", b"GGUX\x03", CheckpointError, "not a GGUF file"),
        (b"GGUF\x03", b"GGUF\x01", UnsupportedError, "version 1"),
        (b"llama.block_count", b"llama.block_coumt", CheckpointError, "'llama.block_count' is missing"),
        (b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", None, UnsupportedError, "'mamba'"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", UnsupportedError, "'blk.0.attn_x.weight' has no place"),
        (b"smollm", b"smollx", UnsupportedError, "pre-tokenizer 'smollx'"),
    ],
)
def test_refusals_name_the_cause(
    valid: bytes, old: bytes, new: bytes | None, error: type[PomariumError], words: str
) -> None:
    new = old.replace(b"llama", b"mamba") if new is None else new
    assert old in valid
    found = _attempt(valid.replace(old, new, 1))
    assert type(found) is error
    assert words in str(found)
    assert "\n" not in str(found)


def test_an_unknown_tensor_type_is_named(valid: bytes) -> None:
    at = valid.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    found = _attempt(valid[:at] + struct.pack("<I", 99) + valid[at + 4 :])
    assert isinstance(found, UnsupportedError)
    assert "GGML type 99" in str(found)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({".expert_count": 8}, "mixture-of-experts"),
        ({".attention.sliding_window": 64}, "sliding window"),
        ({".rope.scaling.type": "longrope", ".rope.scaling.factor": 2.0}, "'longrope'"),
        ({".rope.dimension_count": 32}, "part of each head"),
        ({"split.count": 3}, "gguf-split --merge"),
    ],
)
def test_unsupported_features_are_refused(extra: dict[str, object], words: str, tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf", Kind.F16, extra=extra, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match=words):
        convert(tmp_path / "m.gguf", tmp_path)
