"""What no file of the repository may contain: an index host, a home directory, binary data, or more than 1 MiB."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MAX_BYTES = 1 << 20
# Written in pieces, so that this file does not match itself.
INDEX_HOST = re.compile(
    "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org", r"/sim" + "ple/"])
)
HOME = re.compile(r"(?<![\w.])/(?:root|home/\w+|Users/\w+)/")
SETTINGS_OF_AN_INDEX = re.compile(r"^\s*(?:-i|--index-url|--extra-index-url|--find-links|-f)\b", re.MULTILINE)


def repository_files() -> list[Path]:
    """Tracked files and those that would be added, present in the working tree."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


FILES = repository_files()


def faults(name: str, data: bytes) -> list[str]:
    """Rules that a file called `name` holding `data` breaks, in words."""
    found = []
    if len(data) > MAX_BYTES:
        found.append(f"{name}: {len(data)} bytes, more than {MAX_BYTES}")
    if b"\0" in data:
        found.append(f"{name}: binary")
    text = data.decode("utf-8", errors="replace")
    found += [f"{name}: names an index host: {match[0]}" for match in INDEX_HOST.finditer(text)]
    found += [f"{name}: names a home directory: {match[0]}" for match in HOME.finditer(text)]
    if name.startswith("requirements/"):
        found += [f"{name}: names an index: {match[0].strip()}" for match in SETTINGS_OF_AN_INDEX.finditer(text)]
    return found


def test_every_file_keeps_the_rules() -> None:
    assert len(FILES) > 10
    found = [fault for path in FILES for fault in faults(path.relative_to(ROOT).as_posix(), path.read_bytes())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "data",
    [
        b"x" * (MAX_BYTES + 1),
        b"GGUF\0\0",
        b"see https://" + b"pypi" + b".org/x",
        b"https://mirror/sim" + b"ple/",
        b"open('/" + b"root/model')",
        b"cd /" + b"home/ann/x",
        b"/" + b"Users/ann/x",
        b"--find-links wheels",
        b"--extra-index-url mirror",
    ],
)
def test_each_rule_can_fail(data: bytes) -> None:
    assert len(faults("requirements/planted.txt", data)) == 1
