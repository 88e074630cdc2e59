"""Files of a batch: whole lines, whatever ended the job before; local, in memory, gzip."""

import errno
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.cluster.batch import output
from pomarium.cluster.batch.output import Appender, BatchFileError, custom_ids, lines, place, recover

LINES = [json.dumps({"custom_id": f"r{n}", "line": n if n % 3 == 0 else None}).encode() + b"\n" for n in range(20)]


@pytest.fixture(params=["{tmp}/out.jsonl", "{tmp}/sub/out.jsonl.gz", "memory://batch/out.jsonl", "memory://o.jsonl.gz"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(request.param).format(tmp=tmp_path)
    memory = fsspec.filesystem("memory")
    memory.store.clear()


def append(name: str, several: list[bytes]) -> None:
    appender = Appender(place(name))
    for line in several:
        appender.add(line)
    appender.flush()


def test_what_was_added_is_there_line_by_line(name: str) -> None:
    append(name, LINES[:5])
    append(name, LINES[5:])
    assert list(lines(place(name))) == LINES
    assert list(custom_ids(place(name)))[:4] == [("r0", 0), ("r1", None), ("r2", None), ("r3", 3)]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_piece_of_a_line_at_the_end_is_dropped(name: str, cut: int) -> None:
    where = place(name)
    append(name, LINES[:5])
    whole = where.system.size(where.path)
    append(name, LINES[5:])
    data = where.system.cat_file(where.path)
    where.system.pipe_file(where.path, data[: whole + cut])
    recover(where)
    kept = list(lines(where))
    assert kept == LINES[: len(kept)]
    assert len(kept) >= 5
    append(name, LINES[len(kept) :])
    assert list(lines(where)) == LINES


@given(st.integers(0, 400), st.booleans())
@settings(max_examples=40)
def test_wherever_it_was_cut(at: int, zipped: bool) -> None:
    name = f"memory://cut.jsonl{'.gz' if zipped else ''}"
    where = place(name)
    for line in LINES[:10]:
        append(name, [line])
    data = where.system.cat_file(where.path)
    where.system.pipe_file(where.path, data[: min(at, len(data))])
    recover(where)
    kept = list(lines(where))
    assert kept == LINES[: len(kept)]
    where.system.rm(where.path)


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[0]) + b"not gzip at all" + gzip.compress(LINES[1]))
    with pytest.raises(BatchFileError, match="is damaged behind byte"):
        recover(place(str(path)))


def test_a_full_disk_leaves_whole_lines_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    appender = Appender(place(str(path)))
    appender.add(LINES[0])
    appender.flush()

    def half(self: Appender, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Appender, "_append", half)
    appender.add(LINES[1])
    with pytest.raises(BatchFileError, match=r"No space left on device.*--resume"):
        appender.flush()
    assert list(lines(place(str(path)))) == LINES[:1]


def test_results_are_in_the_file_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(output, "FLUSH_BYTES", len(LINES[0]) + 1)
    appender = Appender(place(str(path)))
    appender.add(LINES[0])
    assert path.read_bytes() == b""
    appender.add(LINES[1])
    assert list(lines(place(str(path)))) == LINES[:2]
    assert appender.written == 2


@pytest.mark.parametrize(
    ("path", "message"), [("/nowhere/in.jsonl", "There is no file"), ("nonesuch://a/b", "cannot be opened")]
)
def test_a_file_that_cannot_be_read(path: str, message: str) -> None:
    with pytest.raises(BatchFileError, match=message):
        list(lines(place(path)))


def test_a_gzip_file_that_ends_too_soon_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(LINES))[:-12])
    with pytest.raises(BatchFileError, match="cannot be read"):
        list(lines(place(str(path))))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchFileError, match="cannot be written"):
        Appender(place(str(tmp_path / "file" / "out.jsonl")))


@pytest.mark.parametrize("line", ["[]", "{}", '{"custom_id": ["a"]}', '{"custom_id": "a", "line": "1"}', "[" * 20_000])
def test_a_file_of_something_else_is_no_result(tmp_path: Path, line: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"custom_id": "a"}\n' + line)
    with pytest.raises(BatchFileError, match="line 2, is no result"):
        list(custom_ids(place(str(path))))


@pytest.mark.parametrize(
    ("out", "errors"),
    [("a/o.jsonl", "a/o.errors.jsonl"), ("o.jsonl.gz", "o.errors.jsonl.gz"), ("o", "o.errors.jsonl")],
)
def test_errors_stand_beside_results(out: str, errors: str) -> None:
    assert output.errors_beside(out) == errors


@pytest.mark.parametrize("out", ["out.jsonl", "out.jsonl.gz"])
def test_the_page_names_the_errors_file_that_is_written(out: str) -> None:
    page = " ".join((Path(__file__).parents[3] / "docs" / "batch.md").read_text().split())
    assert f"`{output.errors_beside(out)}` beside `{out}`" in page


def test_one_file_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert output.same_file(place(str(tmp_path / "a")), place(str(tmp_path / "b")))
    assert not output.same_file(place(str(tmp_path / "a")), place("memory://a"))


def test_lines_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of any length is read by pieces."""

    class Endless(io.RawIOBase):
        read_bytes = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = b"\n" * len(buffer)
            Endless.read_bytes += len(buffer)
            return len(buffer)

    where = place("memory://endless")
    monkeypatch.setattr(where.system, "open", lambda path, mode: Endless())
    assert next(lines(where)) == b"\n"
    assert Endless.read_bytes <= 2 << 20
