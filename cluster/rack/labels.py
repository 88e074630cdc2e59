"""A Mac's facts as labels of its Ray node, and back. Pure.

    MacFacts --labels_of--> `ray start --labels` --> ray.nodes()[i]["Labels"] --facts_of--> MacFacts

Ray keeps to Kubernetes' syntax (ray/_private/label_utils.py): a value has at most 63 letters, digits, '.', '-' and '_',
the first and last of them a letter or digit; a key may have a prefix before a slash, and "ray.io/" is Ray's own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pomarium.worker.errors import SettingsError

PREFIX = "pomarium.mac/"
NAME_LABEL = f"{PREFIX}name"
"""Holds the name by which the rack knows the Mac; among live nodes it is unique."""
CHIP_LABEL = f"{PREFIX}chip"
_MEMORY, _MODEL_MEMORY = f"{PREFIX}memory", f"{PREFIX}model-memory"
_BANDWIDTH, _FLOPS = f"{PREFIX}bandwidth", f"{PREFIX}flops"
_VERSION = f"{PREFIX}version"
AUTOSCALER_LABEL = "pomarium.rack/autoscaler"
"""Of the head's node where Macs sleep: who joins is to be known to the autoscaler first."""
UNKNOWN_VERSION = "unknown"

LONGEST = 63
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_FIGURE = re.compile(r"[0-9]{1,30}")


@dataclass(frozen=True)
class MacFacts:
    """What the rack knows of a Mac.

    Attributes:
        name: unique within the rack.
        chip: "M2 Ultra", or what the processor is called. memory: bytes of the machine, or of its limit.
        model_memory: bytes that a stage may take in all.
        bandwidth: bytes/s from memory. flops: FLOP/s. Both as a model reaches them.
        version: what it runs, as cluster/machine/version.py writes it. Engines leave Macs of another one alone.
    """

    name: str
    chip: str
    memory: int
    model_memory: int
    bandwidth: float
    flops: float
    version: str = UNKNOWN_VERSION


def check_name(name: str) -> str:
    """`name`, if it can be one of a Mac. Raises SettingsError."""
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot be the name of a Mac: choose at most {LONGEST} letters, digits, '.', '-' and '_' that "
            "begin and end with a letter or digit."
        )
    return name


def labels_of(facts: MacFacts) -> dict[str, str]:
    """Labels for the node of a Mac; figures are rounded to whole bytes and operations. Raises SettingsError."""
    return {
        NAME_LABEL: check_name(facts.name),
        CHIP_LABEL: _as_value(facts.chip),
        _MEMORY: str(facts.memory),
        _MODEL_MEMORY: str(facts.model_memory),
        _BANDWIDTH: str(round(facts.bandwidth)),
        _FLOPS: str(round(facts.flops)),
        _VERSION: facts.version,
    }


def facts_of(labels: Mapping[str, str]) -> MacFacts | None:
    """The facts that a node's labels tell; None if it has none of ours. Raises SettingsError for broken ones."""
    if not any(key.startswith(PREFIX) for key in labels):
        return None
    name = _text(labels, NAME_LABEL, "a node")
    return MacFacts(
        name,
        _text(labels, CHIP_LABEL, name).replace("_", " "),
        _figure(labels, _MEMORY, name),
        _figure(labels, _MODEL_MEMORY, name),
        float(_figure(labels, _BANDWIDTH, name)),
        float(_figure(labels, _FLOPS, name)),
        labels.get(_VERSION, UNKNOWN_VERSION),
    )


def _as_value(chip: str) -> str:
    """`chip` within Ray's syntax: spaces become '_' (and come back), what else is not allowed is left out."""
    kept = re.sub(r"[^A-Za-z0-9.-]+", " ", chip.replace("(R)", "").replace("(TM)", ""))
    return "_".join(kept.split())[:LONGEST].strip("._-") or "unknown"


def _text(labels: Mapping[str, str], key: str, name: str) -> str:
    value = labels.get(key)
    if not value:
        raise SettingsError(f"The label {key} of {name} is missing: let the Mac join again with `pomarium rack join`.")
    return value


def _figure(labels: Mapping[str, str], key: str, name: str) -> int:
    value = _text(labels, key, name)
    if not _FIGURE.fullmatch(value) or int(value) == 0:
        raise SettingsError(
            f"The label {key} of {name} is {value!r}, not a number of more than 0: let the Mac join again with "
            "`pomarium rack join`."
        )
    return int(value)
