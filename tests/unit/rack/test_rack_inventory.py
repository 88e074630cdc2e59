"""rack.yaml is read as written, and every fault in it is named with line and field."""

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.machine import units
from pomarium.cluster.machine.chips import CHIPS, identify
from pomarium.cluster.rack import inventory, yaml_lines
from pomarium.cluster.rack.inventory import load, parse
from pomarium.cluster.rack.placement_inputs import rack_of, working_set
from pomarium.worker.errors import SettingsError

EXAMPLE = Path(__file__).parents[3] / "deploy/rack.example.yaml"

SMALL = """\
macs:
  - name: a
    address: 10.0.0.1
    memory: 16GiB
    chip: M4
  - name: b
    address: b.rack
    memory: 64GiB
    bandwidth: 500GB/s
    flops: 14TFLOPS
"""


def refusal(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    return str(caught.value)


def test_the_example_is_read() -> None:
    rack = load(EXAMPLE)
    assert [mac.name for mac in rack.macs] == ["studio-1", "studio-2", "mini-1"]
    assert rack.macs[0].memory == 192 << 30
    assert rack.macs[0].hardware_address == "a4:83:e7:00:00:11"
    assert rack.macs[0].labels == {"room": "2.14"}
    assert rack.head is not None
    assert (rack.head.mac, rack.head.port) == ("studio-1", 6379)
    assert rack.sleep.idle == 900
    assert rack.sleep.quiet_hours == ((22 * 60, 7 * 60),)
    assert [(m.stages, m.replicas.min, m.replicas.max) for m in rack.models] == [(1, 1, 3), (None, 0, 1)]


def test_facts_for_placement() -> None:
    """Measured figures are taken as they are; others come from the table, less what is not reached."""
    rack = rack_of(load(EXAMPLE))
    one, two, three = rack.macs
    assert rack.link("studio-2", "studio-1").bandwidth == 5e9
    assert rack.link("studio-1", "mini-1").bandwidth == 1.25e9
    assert three.memory == 52 << 30
    assert one.memory == int((144 << 30) * 0.9)
    assert one.bandwidth == 0.75 * 800e9
    assert two.flops == pytest.approx(0.6 * 40 * 256 * 1.47e9)
    a, b = rack_of(parse(SMALL)).macs
    assert (b.bandwidth, b.flops) == (500e9, 14e12)
    assert a.memory == int(working_set(16 << 30) * 0.9) == int((16 << 30) * 2 // 3 * 0.9)
    assert rack_of(parse(SMALL)).default_link.bandwidth == 1.25e8


FAULTS = {
    "unknown": (("memory: 16GiB", "memmory: 16GiB"), "line 4, macs[1].memmory: this field is unknown; did you mean"),
    "missing": (("    address: b.rack\n", ""), "line 6, macs[2].address: this field is missing."),
    "no unit": (("64GiB", "64"), "line 8, macs[2].memory: '64' is not a size such as 64GiB."),
    "speed": (("500GB/s", "fast"), "line 9, macs[2].bandwidth: 'fast' is not a speed such as 800GB/s or 10Gb/s."),
    "empty": (("chip: M4", "chip:"), "line 5, macs[1].chip: The chip '' is not in the table"),
    "chip": (("chip: M4", "chip: M9 Mega"), "line 5, macs[1].chip: The chip 'M9 Mega' is not in the table"),
    "no chip": (("    chip: M4\n", ""), "macs[1].chip: a has neither a chip nor both bandwidth and flops."),
    "name": (("name: b", "name: a"), "line 6, macs[2].name: two Macs have 'a'."),
    "bad name": (("name: b", "name: -b"), "line 6, macs[2].name: '-b' is not a name of letters"),
    "address": (("10.0.0.1", "10.0.0.256"), "line 3, macs[1].address: '10.0.0.256' is neither an IP address"),
    "twice": (("    chip: M4", "    name: c"), "line 5: the file is refused: has the key 'name' twice."),
    "not yaml": (("    chip: M4", "   chip: M4"), "line 5: the file is refused: not valid YAML"),
    "no list": (("macs:", "macs: none\nmodels:"), "line 1, macs: expected a list here, one `- item` a line."),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_line_and_field(fault: str) -> None:
    (old, new), sentence = FAULTS[fault]
    assert old in SMALL
    said = refusal(SMALL.replace(old, new, 1))
    assert said.startswith("rack.yaml, line ")
    assert sentence in said


ADDED = {
    "head:\n  mac: c\n": "line 12, head.mac: there is no Mac 'c'.",
    "head: {port: 70000, mac: a}\n": "line 11, head.port: '70000' is refused: input should be less than or equal",
    "head: {port: 6379}\n": "line 11, head: give either `mac`, the name of one, or `address`.",
    "links:\n  pairs:\n    - between: [a, a]\n": "line 13, links.pairs[1].between: a and a are one Mac",
    "links: {pairs: [{between: [a, x]}]}\n": "line 11, links.pairs[1].between: there is no Mac 'x'.",
    "links: {default: {latency: 3}}\n": "line 11, links.default.latency: '3' is not a duration",
    "links: {default: {speed: 3}}\n": "line 11, links.default.speed: this field is unknown; known are bandwidth,",
    "sleep:\n  quiet_hours: [22:00]\n": "line 12, sleep.quiet_hours[1]: '22:00' is not a span such as 22:00-07:00.",
    "sleep:\n  quiet_hours: [25:00-07:00]\n": "sleep.quiet_hours[1]: '25:00' is not a time of day such as 22:30.",
    "sleep:\n  always_awake: [a, bb]\n": "line 12, sleep.always_awake[2]: there is no Mac 'bb'",
    "models:\n  - {name: m, source: x, stages: 3}\n": "line 12, models[1].stages: 3 stages need as many Macs",
    "models:\n  - {name: m, source: x, stages: some}\n": "models[1].stages: 'some' is neither `auto` nor a number",
    "models:\n  - {name: m, source: x, replicas: {min: 2}}\n": "line 12, models[1].replicas.min: min is more than max.",
    "models:\n  - {name: m, source: x, replicas: {min: two}}\n": "models[1].replicas.min: 'two' is refused",
    "sleep: &s {idle: 1m}\nhead: *s\n": "uses a YAML alias",
    "model: []\n": "line 11, model: this field is unknown; did you mean 'models'?",
    "sleep: {idle: }\n": "line 11, sleep.idle: this field is empty; give it a value or leave it out.",
}


@pytest.mark.parametrize("added", ADDED)
def test_faults_of_the_other_parts(added: str) -> None:
    assert ADDED[added] in refusal(SMALL + added)


def test_all_faults_come_at_once() -> None:
    said = refusal(SMALL.replace("16GiB", "16").replace("64GiB", "64").replace("M4", "M4\n    colour: red"))
    assert [f"line {line}," in said for line in (4, 6, 9)] == [True] * 3


def test_text_is_taken_as_written() -> None:
    """YAML 1.1 would make these a base-60 number, a boolean and a float."""
    text = SMALL.replace("name: a", "name: no").replace("chip: M4", "chip: M4\n    hardware_address: 10:20:30:40:50:59")
    rack = parse(text + "    labels: {version: 1.10}\n")
    assert rack.macs[0].name == "no"
    assert rack.macs[0].hardware_address == "10:20:30:40:50:59"
    assert rack.macs[1].labels == {"version": "1.10"}


@pytest.mark.parametrize("text", ["", "[]", "word", "macs: []", "\t", "%", "a: [", "[" * 700])
def test_no_rack_at_all(text: str) -> None:
    assert "rack.yaml, line 1" in refusal(text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "rack.yaml").write_bytes(b"macs: \xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load(tmp_path / "rack.yaml")


@given(st.text(st.sampled_from(string.printable + "é\0"), max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Never another exception than SettingsError."""
    for candidate in (text, SMALL + text, SMALL.replace("M4", text)):
        try:
            said = str(parse(candidate).macs)
        except SettingsError as error:
            said = str(error)
        assert said.startswith(("rack.yaml, line ", "(MacEntry("))


trees = st.recursive(
    st.text(string.ascii_letters, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz", min_size=1, max_size=3), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text("abcxyz", min_size=1, max_size=3), trees, min_size=1))
def test_lines_are_those_of_the_text(tree: dict[str, object]) -> None:
    text = yaml.dump(tree)
    document = yaml_lines.parse(text)
    assert document.data == tree
    for path, line in document.lines.items():
        if path and isinstance(path[-1], str):
            assert path[-1] in text.splitlines()[line - 1]


@given(
    st.integers(0, 10**15), st.sampled_from([("B", 1), ("kB", 10**3), ("GB", 10**9), ("GiB", 2**30), ("TiB", 2**40)])
)
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert units.parse_size(f"{number}{unit[0]}") == pytest.approx(number * unit[1], rel=1e-15)
    assert units.parse_size(f" {number} {unit[0]} ") == units.parse_size(f"{number}{unit[0]}")


@given(
    st.integers(1, 99999), st.sampled_from([("Gb/s", 1.25e8), ("Gbit/s", 1.25e8), ("GB/s", 1e9), ("MiB/s", 2.0**20)])
)
def test_rates(number: int, unit: tuple[str, float]) -> None:
    assert units.parse_rate(f"{number / 100}{unit[0]}") == pytest.approx(number / 100 * unit[1])


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_durations(hours: int, minutes: int, seconds: int) -> None:
    assert units.parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds
    assert units.parse_duration(f"{seconds}ms") == pytest.approx(seconds / 1000)


@given(st.integers(0, 23), st.integers(0, 59))
def test_clock(hour: int, minute: int) -> None:
    assert units.parse_clock(f"{hour}:{minute:02}") == 60 * hour + minute
    assert units.parse_clock(f"{hour:02}:{minute:02}") == 60 * hour + minute


PARSERS = (units.parse_size, units.parse_rate, units.parse_flops, units.parse_duration, units.parse_clock)


@given(st.one_of(st.text(max_size=12), st.from_regex(r"[0-9.]{0,400}\s?[kKMGTi]{0,2}[Bb]?(/s)?", fullmatch=True)))
def test_parsers_give_numbers_or_value_errors(text: str) -> None:
    for parser in PARSERS:
        try:
            value = parser(text)
        except ValueError as error:
            assert " is " in str(error)  # noqa: PT017
        else:
            assert 0 <= value < float("inf")


@given(st.integers(1, 2**60))
def test_formatted_sizes_can_be_read_again(size: int) -> None:
    assert units.parse_size(units.format_size(size).replace(",", "")) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("refused", ["64", "GiB", "-3GiB", "1e3GB", "3 gib", "3..4GB", "٣GB", "1 2GB"])
def test_sizes_that_are_none(refused: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 64GiB"):
        units.parse_size(refused)


def test_chips() -> None:
    assert identify("Apple M2 Ultra", 76) == CHIPS["M2 Ultra", 76]
    assert identify("m1").gpu_cores == 7
    assert identify("M4 Max", 40).bandwidth == 546e9
    assert identify("M4 Max").bandwidth == 410e9  # the smaller one, until the cores are known
    assert identify("M1 Max", 32).flops == pytest.approx(10.4e12, rel=0.02)  # Apple's own figure
    assert identify("M2", 10).flops == pytest.approx(3.6e12, rel=0.02)
    for (name, cores), chip in CHIPS.items():
        assert identify(f"Apple {name}", cores) == chip
        assert 50e9 < chip.bandwidth < 1000e9
        assert 2e12 < chip.flops < 35e12
    for brand in ("Apple M77", "M2 Mega", "Intel(R) Core(TM) i9", "", "M4 Pro Max"):
        with pytest.raises(SettingsError, match=r"bandwidth: <n>GB/s.*rack\.yaml"):
            identify(brand)
    with pytest.raises(SettingsError, match="no M4 with 20 GPU cores"):
        identify("M4", 20)


def test_known_keys_name_existing_fields() -> None:
    """The did-you-mean of a nested field offers that part's fields."""
    assert "ssh_user" in inventory._known_keys(("macs", 0))
    assert inventory._known_keys(("models", 0, "replicas")) == ["min", "max", "keep", "load"]
    assert "idle" in refusal(SMALL + "sleep: {idl: 5m}\n")
