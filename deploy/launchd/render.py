"""Makes a launchd job of a template, with Python's standard library alone: it runs before anything is installed.

    render.py TEMPLATE NAME=VALUE ... [-- ARGUMENT ...] > JOB.plist

Each @NAME@ becomes VALUE; a key whose value becomes empty is left out; ARGUMENTs follow the job's own.
"""

import plistlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLACEHOLDER = re.compile(r"@([A-Z_]+)@")


def render(template: bytes, values: Mapping[str, str], arguments: Sequence[str] = ()) -> bytes:
    """The job as an XML property list. Raises KeyError for a placeholder without a value."""
    job = _filled(plistlib.loads(template), values)
    job["ProgramArguments"] += arguments
    return plistlib.dumps(job, sort_keys=False)


def _filled(part: Any, values: Mapping[str, str]) -> Any:
    if isinstance(part, str):
        return PLACEHOLDER.sub(lambda found: values[found[1]], part)
    if isinstance(part, list):
        return [_filled(each, values) for each in part]
    if isinstance(part, dict):
        return {key: value for key, each in part.items() if (value := _filled(each, values)) != ""}
    return part


def main(words: Sequence[str]) -> None:
    """As the command line says."""
    end = words.index("--") if "--" in words else len(words)
    values = dict(word.split("=", 1) for word in words[1:end])
    sys.stdout.buffer.write(render(Path(words[0]).read_bytes(), values, words[end + 1 :]))


if __name__ == "__main__":
    main(sys.argv[1:])
