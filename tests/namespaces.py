"""Linux network namespaces for tests: made where they can be, else a skip with the reason.

Where CI is set and the tests run as root they have to be there: a skip would then hide that nothing was tested.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest


def ip(*arguments: str) -> None:
    """`ip` of iproute2. Raises subprocess.CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def namespace_or_skip(prefix: str) -> Iterator[str]:
    """A new namespace, in it `lo`, which is down. Skips, or fails in CI as root, if there can be none."""
    if shutil.which("ip") is None:
        _without("iproute2 is not installed")
    name = f"{prefix}{secrets.token_hex(2)}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        _without(" ".join(error.stderr.split()) or f"`ip netns add` ended with code {error.returncode}")
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _without(why: str) -> NoReturn:
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"network namespaces cannot be made here, and CI's tests run as root: {why}")
    pytest.skip(f"network namespaces cannot be made here: {why}")
