"""A Mac's facts survive the way through Ray's labels, which Ray itself accepts."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import parse_node_labels_string, validate_label_key, validate_label_value

from pomarium.cluster.machine.chips import CHIPS, is_apple
from pomarium.cluster.rack.labels import NAME_LABEL, PREFIX, MacFacts, check_name, facts_of, labels_of
from pomarium.worker.errors import SettingsError

ENDS = string.ascii_letters + string.digits
NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True)
FIGURES = st.integers(1, 10**18)
FACTS = st.builds(MacFacts, NAMES, st.text(max_size=100), FIGURES, FIGURES, FIGURES.map(float), FIGURES.map(float))


@given(FACTS)
def test_ray_takes_the_labels_and_gives_them_back(facts: MacFacts) -> None:
    labels = labels_of(facts)
    for key, value in labels.items():
        assert validate_label_key(key) is None
        validate_label_value(value)
    read = facts_of(parse_node_labels_string(",".join(f"{key}={value}" for key, value in labels.items())))
    assert read is not None
    assert (read.name, read.memory, read.model_memory) == (facts.name, facts.memory, facts.model_memory)
    assert (read.bandwidth, read.flops) == (facts.bandwidth, facts.flops)
    assert facts_of(labels_of(read)) == read


def test_apple_s_chips_keep_their_names() -> None:
    for chip in CHIPS.values():
        read = facts_of(labels_of(MacFacts("m", chip.name, 1, 1, chip.bandwidth, chip.flops)))
        assert read is not None
        assert read.chip == chip.name
        assert is_apple(read.chip)
    read = facts_of(labels_of(MacFacts("m", "Intel(R) Xeon(R) CPU @ 2.20GHz", 1, 1, 1, 1)))
    assert read is not None
    assert read.chip == "Intel Xeon CPU 2.20GHz"


def test_a_node_without_our_labels_is_no_mac() -> None:
    assert facts_of({}) is None
    assert facts_of({"ray.io/node-id": "ab", "room": "2"}) is None


@pytest.mark.parametrize("key", [f"{PREFIX}{what}" for what in ("name", "chip", "memory", "model-memory", "bandwidth")])
@pytest.mark.parametrize("value", [None, "", "-5", "0", "many"])
def test_broken_labels_are_named(key: str, value: str | None) -> None:
    labels = labels_of(MacFacts("mini", "M4", 16, 8, 1, 1))
    text = key in (NAME_LABEL, f"{PREFIX}chip")
    broken = {k: v for k, v in labels.items() if k != key} | ({} if value is None else {key: value})
    if text and value:
        assert facts_of(broken) is not None
        return
    with pytest.raises(SettingsError, match=key):
        facts_of(broken)


@pytest.mark.parametrize("name", ["", "-a", "a-", "a b", "a,b", "a=b", "é", "x" * 64, "a\n"])
def test_names_that_no_label_holds_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="name of a Mac"):
        check_name(name)
