"""Linux network namespaces for tests: made where they can be, else a skip with the reason: many containers, CI's among
them, may make none, and a kernel may lack bridges or pairs of interfaces.
"""

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest


def ip(*arguments: str) -> None:
    """`ip` of iproute2, as part of a test's network. Skips if it is refused."""
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        _without(f"`ip {' '.join(arguments)}`: {' '.join(done.stderr.split())}")


@contextmanager
def namespace_or_skip(prefix: str) -> Iterator[str]:
    """A new namespace, in it `lo`, which is down. Skips if there can be none."""
    if shutil.which("ip") is None:
        _without("iproute2 is not installed")
    name = f"{prefix}{secrets.token_hex(2)}"
    ip("netns", "add", name)
    try:
        ip("netns", "exec", name, "true")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _without(why: str) -> NoReturn:
    pytest.skip(f"network namespaces cannot be made here: {why}")
