"""What belonging to a rack means for a process: where Ray's head is, the token, TLS, as facts and as variables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pomarium.worker.handoff.credentials import PLAINTEXT_VARIABLE, TLS_VARIABLE

SAME_PYTHON: Mapping[str, str] = {"RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor"}
"""Ray refuses a node or driver whose Python is not the head's to the patch (ray/_private/utils.py,
check_version_info), which no two Macs' package managers promise. Pickles and bytecode change with the minor version."""


@dataclass(frozen=True)
class Membership:
    """Attributes:
    session: drawn for each `up` or `join` of this machine; marks its processes.
    address: HOST:PORT of Ray's head, an IP address.
    token: RAY_AUTH_TOKEN.
    tls: folder with this machine's certificate; None for plain text.
    plaintext: the user lets tensors cross the network in plain text.
    """

    session: str
    address: str
    token: str = field(repr=False)
    tls: Path | None = None
    plaintext: bool = False

    def variables(self) -> dict[str, str]:
        """What drivers and nodes need in their environment before Ray is imported."""
        found = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            **SAME_PYTHON,
        }
        if self.tls is not None:
            found[TLS_VARIABLE] = str(self.tls)
        if self.plaintext:
            found[PLAINTEXT_VARIABLE] = "1"
        return found
