"""What has to be the same on all Macs of a rack: engine and workers exchange pickles."""

import platform
from importlib import metadata


def own_version() -> str:
    """Of Pomarium and Python, as in "0.1.0-py3.11"; a value of Ray's node labels."""
    major, minor, _ = platform.python_version_tuple()
    return f"{metadata.version('pomarium')}-py{major}.{minor}"
