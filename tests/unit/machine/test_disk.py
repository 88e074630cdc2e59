"""A disk without room is named, whatever fails on it."""

import errno
from pathlib import Path

import pytest

from pomarium.cluster import faults
from pomarium.cluster.machine import disk
from pomarium.cluster.machine.disk import LEAST_FREE, DiskFullError, Room

MIB = 1 << 20


def test_the_tightest_disk_is_named() -> None:
    rooms = [
        Room("logs", Path("/a"), 90 * MIB),
        Room("Ray's files", Path("/b"), 3 * MIB),
        Room("x", Path("/c"), 5 * MIB),
    ]
    sentence = disk.shortage(rooms)
    assert sentence == "The disk of /b (Ray's files) is full: less than 64 MiB are free. Make room there."
    assert disk.shortage(rooms, 2 * MIB) is None
    assert disk.shortage([Room("logs", Path("/a"), LEAST_FREE)]) is None
    assert disk.shortage([]) is None


def test_rooms_are_those_of_the_folders_that_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.tempfile, "tempdir", None)
    environ = {"XDG_STATE_HOME": str(tmp_path / "not" / "yet"), "TMPDIR": str(tmp_path)}
    found = disk.rooms(str(tmp_path), environ)
    assert [room.folder for room in found] == [tmp_path, tmp_path, tmp_path / "not" / "yet" / "pomarium"]
    assert len({room.free for room in found}) == 1
    assert found[0].free > 0
    monkeypatch.setattr(disk, "LEAST_FREE", 0)
    disk.require(str(tmp_path), environ)


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "free", lambda folder: 0)
    with pytest.raises(DiskFullError, match=f"The disk of {tmp_path} .* is full: less than 64 MiB are free"):
        disk.require(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"),
         "No space is left on the disk where /x/y was to be written: make room there."),
        (OSError(errno.ENOSPC, "No space left on device"), "No space is left on the disk: make room there."),
        (OSError(errno.EACCES, "Permission denied", "/x"), "PermissionError: [Errno 13] Permission denied: '/x'"),
    ],
)  # fmt: skip
def test_a_write_that_found_no_room_says_where(error: OSError, sentence: str) -> None:
    assert faults.sentence(error) == sentence
