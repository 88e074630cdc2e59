"""`pomarium doctor` on a Mac: findings on what macOS says.

    MacFacts --diagnose--> Findings

All but a wrong processor architecture and too old a macOS are advice: a Mac that serves itself needs none of it.
"""

from dataclasses import dataclass

from pomarium.cluster.cli.finding import Finding
from pomarium.cluster.cli.mac_facts import Firewall, MacFacts

OLDEST = (15,)
"""The oldest macOS that the pinned wheels are for (requirements/macos-arm64.txt)."""


@dataclass(frozen=True)
class Trouble:
    """What users of MLX reported of some versions of macOS.

    Attributes:
        first, last: versions, both included, as far as they were reported; a shorter one holds for all that begin so.
        source: where it was reported.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    what: str
    advice: str
    source: str


TROUBLES = (
    Trouble(
        (15, 7),
        (26, 5, 2),
        'kernel panics "completeMemory() prepare count underflow" under long MLX loads',
        "If this Mac restarts while it serves, leave wired memory off and update macOS.",
        "ml-explore/mlx 3186, jundot/omlx 300",
    ),
    Trouble(
        (26, 4),
        (26, 4),
        'MLX 0.31 could not compile its kernels ("unknown type name bfloat16_t")',
        "Run `pomarium selftest`: its first rows tell. If they fail, update macOS.",
        "ml-explore/mlx 3337",
    ),
    Trouble(
        (26, 5),
        (26, 5),
        "an MLX built from source with this version's Metal toolchain multiplies matrices of more than 8 rows wrongly",
        "Use MLX's wheel, as `make install` does.",
        "ml-explore/mlx 3586",
    ),
)
"""Reports of others, none seen by us."""


def diagnose(mac: MacFacts, joins: bool) -> list[Finding]:
    """All findings. joins: whether this Mac is part of a rack, or to be one."""
    return [*_versions(mac), *_rosetta(mac), *_network(mac), *_firewall(mac, joins), *_power(mac, joins)]


def troubles(version: tuple[int, ...]) -> list[Trouble]:
    """Those of a version of macOS."""
    return [
        each
        for each in TROUBLES
        if each.first <= version[: max(len(each.first), len(each.last))] and version[: len(each.last)] <= each.last
    ]


def _versions(mac: MacFacts) -> list[Finding]:
    name = ".".join(map(str, mac.version)) or "unknown"
    if mac.version and mac.version < OLDEST:
        return [Finding("macOS", name, "Update to macOS 15 or later: the packages are built for it.")]
    found = troubles(mac.version)
    advice = [Finding("macOS", f"{name}: {each.what} ({each.source})", each.advice, fatal=False) for each in found]
    return advice or [Finding("macOS", name)]


def _rosetta(mac: MacFacts) -> list[Finding]:
    if not mac.translated:
        return []
    cure = "Install a Python for arm64 and run `make install` with it: this one is for Intel and runs under Rosetta."
    return [Finding("Rosetta", "in use", cure)]


def _network(mac: MacFacts) -> list[Finding]:
    if mac.gateway is None:
        return [Finding("local network", "no router")]
    if not mac.unreachable:
        return [Finding("local network", f"{mac.gateway} can be reached")]
    cure = (
        "If it is on, macOS keeps this program off the local network: allow the terminal in System Settings, Privacy & "
        "Security, Local Network. A daemon or a session over ssh is not asked."
    )
    return [Finding("local network", f"no route to {mac.gateway}", cure, fatal=False)]


def _firewall(mac: MacFacts, joins: bool) -> list[Finding]:
    state = Finding("firewall", mac.firewall.value)
    if not joins or mac.firewall in (Firewall.OFF, Firewall.UNKNOWN):
        return [state]
    if mac.firewall is Firewall.BLOCKS_ALL:
        cure = "Other Macs cannot connect: in System Settings, Network, Firewall, do not block all connections."
    else:
        cure = "If other Macs cannot connect, allow Python's connections in System Settings, Network, Firewall."
    return [Finding("firewall", mac.firewall.value, cure, fatal=False)]


def _power(mac: MacFacts, joins: bool) -> list[Finding]:
    findings = []
    if mac.power.get("lowpowermode") == 1:
        cure = "Turn it off for full speed: `sudo pmset -a lowpowermode 0`."
        findings.append(Finding("low power mode", "on", cure, fatal=False))
    if minutes := mac.power.get("sleep"):
        cure = "For a Mac that is to serve at all times: `sudo pmset -a sleep 0`."
        findings.append(Finding("sleep", f"after {minutes} min without a user", cure, fatal=False))
    if joins and mac.power.get("womp") == 0:
        cure = "The rack cannot wake it: `sudo pmset -a womp 1`."
        findings.append(Finding("wake on LAN", "off", cure, fatal=False))
    return findings or [Finding("power settings", "stays awake, full speed" if mac.power else "unknown")]
