"""rack.yaml: the Macs, their links and sleep, and the models served from them. One schema, read by every command.

    rack.yaml --load--> Inventory, or a SettingsError with one sentence per fault: file, line, field, what to write

Sizes, speeds and durations are written with units (units.py). docs/placement.md explains the fields,
deploy/rack.example.yaml shows all of them.
"""

import difflib
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pomarium.cluster.machine import units
from pomarium.cluster.machine.chips import identify
from pomarium.cluster.placement.model import ETHERNET
from pomarium.cluster.rack import yaml_lines
from pomarium.worker.errors import SettingsError

KEEP_S = 600.0
LOAD = 8.0
"""Where rack.yaml says nothing of a model's replicas (docs/benchmarks.md, "A rack through a day")."""

WAKE_DEADLINE_S = 180.0

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_HARDWARE = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


def _from_text(parser: Callable[[str], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: parser(value) if isinstance(value, str) else value)


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name of letters, digits, '.', '-' and '_'")
    return text


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.fullmatch(text) or re.fullmatch(r"[\d.]+", text):
            raise ValueError(f"{text!r} is neither an IP address nor a host name") from None
        return text


def _hardware_address(text: str) -> str:
    address = text.lower().replace("-", ":")
    if not _HARDWARE.fullmatch(address):
        raise ValueError(f"{text!r} is not a hardware address such as a4:83:e7:00:12:9f")
    return address


def stages_of(text: str) -> int | None:
    """Number of stages; None for `auto`. Raises ValueError."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text[:9]) < 1:
        raise ValueError(f"{text!r} is neither `auto` nor a number of stages")
    return int(text[:9])


def _quiet(text: str) -> tuple[int, int]:
    begin, dash, end = text.partition("-")
    if not dash:
        raise ValueError(f"{text!r} is not a span such as 22:00-07:00")
    return units.parse_clock(begin), units.parse_clock(end)


Name = Annotated[str, _from_text(_name)]
Size = Annotated[int, _from_text(units.parse_size), Field(gt=0)]
Rate = Annotated[float, _from_text(units.parse_rate)]
Flops = Annotated[float, _from_text(units.parse_flops)]
Duration = Annotated[float, _from_text(units.parse_duration)]
Address = Annotated[str, _from_text(_address)]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MacEntry(_Strict):
    """One Mac.

    Attributes:
        memory: bytes, of the machine. model_memory: bytes that a model may take; None: placement_inputs.py.
        chip, gpu_cores: as chips.py knows them. bandwidth, flops: bytes/s and FLOP/s, measured; before the table's.
        hardware_address: of the interface that listens for wake-up packets.
        ssh_user: the Mac is told over ssh to join and to sleep; None: its own agent does both (`rack join --stay`).
        ssh_port: of its ssh server. program: the `pomarium` command there.
    """

    name: Name
    address: Address
    memory: Size
    chip: str | None = None
    gpu_cores: Annotated[int, Field(gt=0)] | None = None
    bandwidth: Rate | None = None
    flops: Flops | None = None
    model_memory: Size | None = None
    hardware_address: Annotated[str, _from_text(_hardware_address)] | None = None
    ssh_user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")] | None = None
    ssh_port: Port = 22
    program: Annotated[str, Field(min_length=1)] = "pomarium"
    labels: dict[Name, str] = Field(default_factory=dict)


class HeadEntry(_Strict):
    """Where Ray's head runs: one of the Macs by name, or another machine by address."""

    mac: Name | None = None
    address: Address | None = None
    port: Port = 6379


class LinkEntry(_Strict):
    """bandwidth: bytes/s. latency: seconds, one way."""

    bandwidth: Rate = ETHERNET.bandwidth
    latency: Duration = ETHERNET.latency


class PairEntry(LinkEntry):
    """A link between two Macs, by name."""

    between: tuple[Name, Name]


class LinksEntry(_Strict):
    """The network: one link for all, and the pairs that have another."""

    default: LinkEntry = LinkEntry()
    pairs: tuple[PairEntry, ...] = ()


class SleepEntry(_Strict):
    """When Macs sleep.

    Attributes:
        idle: seconds without work before a Mac sleeps; None keeps all awake.
        always_awake: Macs by name.
        quiet_hours: (begin, end) in minutes after midnight, local time, over midnight if end < begin: no Mac is woken
            then.
        wake_port: UDP port that wake-up packets are sent to.
        wake_deadline: seconds from the first packet until the Mac's node has joined; then the wake has failed.
    """

    idle: Duration | None = None
    always_awake: tuple[Name, ...] = ()
    quiet_hours: tuple[Annotated[tuple[int, int], _from_text(_quiet)], ...] = ()
    wake_port: Port = 9
    wake_deadline: Annotated[Duration, Field(gt=0)] = WAKE_DEADLINE_S


class ReplicasEntry(_Strict):
    """How many copies of a model run.

    Attributes:
        min, max: at least and at most; a min of 0 lets all Macs sleep.
        keep: seconds for which a copy is kept after it was last needed.
        load: requests at once that one copy is meant to take, before another is started.
    """

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    keep: Duration = KEEP_S
    load: Annotated[float, Field(gt=0)] = LOAD


class ModelEntry(_Strict):
    """A model behind the endpoint.

    Attributes:
        name: in requests. source: a folder, GGUF file, id, or smollm2. stages: Macs per replica, None is `auto`.
        context: tokens per request. streams: requests at once per replica.
    """

    name: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    stages: Annotated[int | None, _from_text(stages_of)] = None
    replicas: ReplicasEntry = ReplicasEntry()
    context: Annotated[int, Field(gt=0)] | None = None
    streams: Annotated[int, Field(gt=0)] = 1


class Inventory(_Strict):
    """rack.yaml as a whole. `head` None: the first Mac."""

    macs: Annotated[tuple[MacEntry, ...], Field(min_length=1)]
    head: HeadEntry | None = None
    links: LinksEntry = LinksEntry()
    sleep: SleepEntry = SleepEntry()
    models: tuple[ModelEntry, ...] = ()

    @property
    def head_mac(self) -> str | None:
        """The Mac that the head runs on; None if that is another machine."""
        return self.macs[0].name if self.head is None else self.head.mac


def load(path: Path) -> Inventory:
    """Read rack.yaml. Raises SettingsError: it cannot be read, or has faults, every one of which is named."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise SettingsError(f"The rack file {path} cannot be read: {reason}.") from error
    return parse(text, str(path))


def parse(text: str, where: str = "rack.yaml") -> Inventory:
    """As `load`, of the file's text; `where` is named in errors."""
    try:
        document = yaml_lines.parse(text)
    except yaml_lines.DocumentError as fault:
        raise SettingsError(f"{where}, line {fault.line}: the file is refused: {fault}.") from fault
    try:
        inventory = Inventory.model_validate(document.data)
    except ValidationError as error:
        faults = [_fault(dict(found), document, where) for found in error.errors()]
        raise SettingsError(" ".join(dict.fromkeys(faults))) from error
    contradictions = [
        f"{where}, line {document.line_of(path)}, {_field(path)}: {sentence}." for path, sentence in _cross(inventory)
    ]
    if contradictions:
        raise SettingsError(" ".join(contradictions))
    return inventory


def _fault(found: dict[str, Any], document: yaml_lines.Document, where: str) -> str:
    path = tuple(part for part in found["loc"] if part != "[key]")
    kind, message = found["type"], found["msg"]
    if kind == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, 1)
        sentence = (
            f"this field is unknown; did you mean {close[0]!r}?"
            if close
            else f"this field is unknown; known are {', '.join(known)}."
        )
    elif kind == "missing":
        sentence = "this field is missing."
    elif found["input"] == "":
        sentence = "this field is empty; give it a value or leave it out."
    elif kind in ("model_type", "dict_type"):
        sentence = "expected `field: value` lines here."
    elif kind in ("tuple_type", "list_type"):
        sentence = "expected a list here, one `- item` a line."
    elif kind == "value_error":
        sentence = f"{message.removeprefix('Value error, ')}."
    else:
        sentence = f"{found['input']!r} is refused: {message[0].lower()}{message[1:]}."
    return f"{where}, line {document.line_of(path)}, {_field(path)}: {sentence}"


def _known_keys(path: yaml_lines.Path) -> list[str]:
    """The fields that the schema has at `path`."""
    model: type[BaseModel] = Inventory
    nested: dict[str, type[BaseModel]] = {
        "macs": MacEntry, "head": HeadEntry, "links": LinksEntry, "default": LinkEntry, "pairs": PairEntry,
        "sleep": SleepEntry, "models": ModelEntry, "replicas": ReplicasEntry,
    }  # fmt: skip
    for part in path:
        model = nested.get(part, model) if isinstance(part, str) else model
    return list(model.model_fields)


def _field(path: yaml_lines.Path) -> str:
    """("macs", 1, "memory") -> macs[2].memory, counting from one as people do."""
    text = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the file"


def _cross(inventory: Inventory) -> Iterator[tuple[yaml_lines.Path, str]]:
    """What fields say against each other: (field, sentence without its full stop)."""
    names = {mac.name for mac in inventory.macs}
    for index, mac in enumerate(inventory.macs):
        if mac.bandwidth is None or mac.flops is None:
            yield from _chip_faults(mac, index)
        if mac.model_memory is not None and mac.model_memory > mac.memory:
            yield ("macs", index, "model_memory"), f"{mac.name} has less memory than that"
    for unique in ("name", "address", "hardware_address"):
        values = [mac.model_dump()[unique] for mac in inventory.macs]
        for value, count in Counter(values).items():
            if value is not None and count > 1:
                last = len(values) - 1 - values[::-1].index(value)
                yield ("macs", last, unique), f"two Macs have {value!r}"
    head = inventory.head
    if head is not None and (head.mac is None) == (head.address is None):
        yield ("head",), "give either `mac`, the name of one, or `address`"
    if head is not None and head.mac is not None and head.mac not in names:
        yield ("head", "mac"), _no_mac(head.mac, names)
    seen: set[frozenset[str]] = set()
    for index, pair in enumerate(inventory.links.pairs):
        path: yaml_lines.Path = ("links", "pairs", index, "between")
        yield from ((path, _no_mac(name, names)) for name in pair.between if name not in names)
        if len(set(pair.between)) < 2 or frozenset(pair.between) in seen:
            yield path, f"{' and '.join(pair.between)} are one Mac or have a link already"
        seen.add(frozenset(pair.between))
    for index, name in enumerate(inventory.sleep.always_awake):
        if name not in names:
            yield ("sleep", "always_awake", index), _no_mac(name, names)
    for index, mac in enumerate(inventory.macs if inventory.sleep.idle is not None else ()):
        if mac.hardware_address is None and mac.name not in {*inventory.sleep.always_awake, inventory.head_mac}:
            yield (
                ("macs", index, "name"),
                f"{mac.name} would sleep and could not be woken: give its hardware_address, or name it in "
                "sleep.always_awake",
            )
    for index, model in enumerate(inventory.models):
        if model.replicas.min > model.replicas.max:
            yield ("models", index, "replicas", "min"), "min is more than max"
        if model.name in {other.name for other in inventory.models[:index]}:
            yield ("models", index, "name"), f"two models are called {model.name!r}"
        if model.stages is not None and model.stages > len(names):
            yield ("models", index, "stages"), f"{model.stages} stages need as many Macs and there are {len(names)}"


def _chip_faults(mac: MacEntry, index: int) -> Iterator[tuple[yaml_lines.Path, str]]:
    if mac.chip is None:
        yield ("macs", index, "chip"), f"{mac.name} has neither a chip nor both bandwidth and flops"
        return
    try:
        identify(mac.chip, mac.gpu_cores)
    except SettingsError as unknown:
        yield ("macs", index, "chip"), str(unknown).rstrip(".")


def _no_mac(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), 1)
    return f"there is no Mac {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
