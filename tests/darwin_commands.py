"""macOS's commands on Linux: stand-ins that print what tests/darwin holds of one Mac, and that Mac's MLX.

Recording(name) --stand_ins(folder)--> executables named sysctl, system_profiler, ..., for the front of PATH
                --device_info()------> what mx.device_info() answers there
"""

import ipaddress
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent / "darwin"

SCRIPTS = {
    # As macOS's: one line for each name, only the values with -n; unknown names are told and make it fail.
    "sysctl": """
values_only='' code=0
for word; do
    [ "$word" != -n ] || { values_only=1; continue; }
    if line=$(grep "^$word: " "$RECORDED/sysctl.txt"); then
        [ -z "$values_only" ] || line=${line#*: }
        printf '%s\\n' "$line"
    else
        echo "sysctl: unknown oid '$word'" >&2
        code=1
    fi
done
exit "$code"
""",
    # Of all its reports; the real one prints those that were asked for.
    "system_profiler": 'cat "$RECORDED/system_profiler.json"',
    "sw_vers": """
case "${1:-}" in
    -productVersion) sed -n 's/^ProductVersion:[[:space:]]*//p' "$RECORDED/sw_vers.txt" ;;
    -buildVersion) sed -n 's/^BuildVersion:[[:space:]]*//p' "$RECORDED/sw_vers.txt" ;;
    *) cat "$RECORDED/sw_vers.txt" ;;
esac
""",
    "uname": 'case "${1:-}" in -m) echo arm64 ;; *) echo Darwin ;; esac',
    "ifconfig": 'cat "$RECORDED/ifconfig.txt"',
}


class Address(NamedTuple):
    """As psutil's net_if_addrs has them."""

    family: socket.AddressFamily
    address: str
    netmask: str | None


@dataclass(frozen=True)
class Recording:
    """What is recorded of one Mac: a folder of tests/darwin."""

    name: str

    @property
    def folder(self) -> Path:
        """Its files."""
        return FOLDER / self.name

    def stand_ins(self, folder: Path) -> None:
        """Writes the commands into `folder`."""
        folder.mkdir(exist_ok=True)
        for name, text in SCRIPTS.items():
            (folder / name).write_text(f"#!/bin/sh\nRECORDED='{self.folder}'\n{text}\n")
            (folder / name).chmod(0o755)

    def sysctl(self, name: str) -> str:
        """The value of a variable."""
        lines = (self.folder / "sysctl.txt").read_text().splitlines()
        return next(line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: "))

    def device_info(self, state: str = "") -> dict[str, str | int]:
        """MLX's answer; `state` names another one of the same Mac."""
        found: dict[str, str | int] = json.loads((self.folder / f"device_info{state}.json").read_text())
        return found

    def net_if_addrs(self) -> dict[str, list[Address]]:
        """What psutil makes of the interfaces of ifconfig.txt: IPv4 alone, netmasks dotted."""
        blocks = re.split(r"^(?=\S)", (self.folder / "ifconfig.txt").read_text(), flags=re.MULTILINE)
        return {
            block.partition(":")[0]: [
                Address(socket.AF_INET, address, str(ipaddress.IPv4Address(int(netmask, 16))))
                for address, netmask in re.findall(r"^\tinet (\S+)(?: --> \S+)? netmask (0x\w+)", block, re.MULTILINE)
            ]
            for block in blocks
            if block
        }


MACS = tuple(Recording(name) for name in ("m1", "m2-ultra", "m3-ultra", "m4-pro", "m5-max"))
RUNNER = Recording("runner")
"""A virtual machine of a CI service."""
