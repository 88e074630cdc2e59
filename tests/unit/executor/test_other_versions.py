"""Macs that run another version than the engine are left alone, and a refusal names them."""

from dataclasses import replace

import pytest

from pomarium.cluster.executor.bundles import PlacementError
from pomarium.cluster.executor.staging import Ask, of_version, slots
from pomarium.cluster.executor.survey import RackNode
from pomarium.cluster.executor.team import _Planner
from pomarium.cluster.machine.version import own_version
from pomarium.cluster.placement.model import Mac
from pomarium.cluster.placement.profile import read_profiles
from pomarium.cluster.rack.labels import UNKNOWN_VERSION, MacFacts, facts_of, labels_of

OWN = own_version()
GIB = 1 << 30


def node(name: str, version: str | None) -> RackNode:
    return RackNode(name, "10.0.0.1", Mac(name, 8 * GIB, 1e11, 1e12), 1, 1, False, version)


def test_only_nodes_of_this_version_are_taken() -> None:
    nodes = (node("a", OWN), node("b", "9.9.9-py3.11"), node("c", None))
    fitting, left_out = of_version(nodes, OWN)
    assert [one.mac.name for one in fitting] == ["a", "c"]
    assert "b runs 9.9.9-py3.11" in left_out
    assert OWN in left_out
    assert of_version(nodes[:1], OWN) == (nodes[:1], "")


def test_a_refusal_says_who_was_left_out() -> None:
    fitting, left_out = of_version((node("a", OWN), node("b", "9.9.9-py3.11")), OWN)
    planner = _Planner(Ask("smollm2", read_profiles("smollm2"), stages=2))
    with pytest.raises(PlacementError, match=r"2 stages need 2 Macs.*b runs 9\.9\.9"):
        planner.staging(slots(fitting, False), slots(fitting, False), slots(fitting, False), left_out)


def test_sleeping_macs_are_counted_on_where_those_awake_do_not_suffice() -> None:
    awake, asleep = node("a", OWN), replace(node("b", OWN), id="", asleep=True)
    planner = _Planner(Ask("smollm2", read_profiles("smollm2"), stages=2))
    free, all_of_them = slots((awake,), False), slots((awake, asleep), False)
    found = planner.staging(free, all_of_them, all_of_them, "")
    assert found is not None
    assert {slot.node.mac.name: slot.node.asleep for slot in found.slots} == {"a": False, "b": True}
    alone = _Planner(Ask("smollm2", read_profiles("smollm2"), stages=1)).staging(free, all_of_them, all_of_them, "")
    assert alone is not None
    assert [slot.node.mac.name for slot in alone.slots] == ["a"]


def test_the_version_is_a_label_and_a_node_without_it_is_of_an_unknown_one() -> None:
    labels = labels_of(MacFacts("m", "M4", 16, 8, 1, 1, OWN))
    read = facts_of(labels)
    assert read is not None
    assert read.version == OWN
    older = facts_of({key: value for key, value in labels.items() if not key.endswith("version")})
    assert older is not None
    assert older.version == UNKNOWN_VERSION != OWN
