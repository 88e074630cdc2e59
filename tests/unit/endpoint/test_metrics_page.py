"""Prometheus pages of several machines become one valid page, and Macs are counted by state."""

import asyncio

import pytest
from endpoint_stub import Stub, serving
from prometheus_client.parser import text_string_to_metric_families
from recording_proxy import proxied

from pomarium.cluster.endpoint.metrics_page import addresses, fetched, macs_by_state, macs_page, merge
from pomarium.cluster.rack.labels import MacFacts
from pomarium.cluster.rack.mac_power import MacPower, Power
from pomarium.cluster.rack.roster import Member

PAGE_1 = """# HELP steps_total Steps.
# TYPE steps_total counter
steps_total{node="1"} 3.0
# HELP kv KV use.
# TYPE kv gauge
kv{node="1"} 0.5
"""
PAGE_2 = """# HELP steps_total Steps.
# TYPE steps_total counter
steps_total{node="2"} 4.0
# HELP lag Lag.
# TYPE lag histogram
lag_bucket{le="+Inf",node="2"} 1.0
lag_count{node="2"} 1.0
lag_sum{node="2"} 2.0
"""


def test_samples_of_a_metric_stand_together_under_one_type() -> None:
    merged = merge([PAGE_1, PAGE_2])
    families = {f.name: [s.value for s in f.samples] for f in text_string_to_metric_families(merged)}
    assert families == {"steps": [3.0, 4.0], "kv": [0.5], "lag": [1.0, 1.0, 2.0]}
    assert merged.count("# TYPE steps_total") == 1


def test_one_page_stays_as_it_is() -> None:
    assert merge([PAGE_1]) == PAGE_1


def test_no_page_is_an_empty_page() -> None:
    assert merge([]) == ""


def test_only_living_nodes_are_asked() -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 81},
        {"Alive": False, "NodeManagerAddress": "10.0.0.2", "MetricsExportPort": 81},
        {"Alive": True, "NodeManagerAddress": "10.0.0.3", "MetricsExportPort": 0},
    ]
    assert addresses(nodes) == ["http://10.0.0.1:81/metrics"]


def mac(name: str, state: Power) -> MacPower:
    return MacPower(name, "10.0.0.1", state, since=0.0)


def member(name: str, alive: bool = True, facts: bool = True) -> Member:
    return Member(name, "10.0.0.1", alive, False, MacFacts(name, "M4", 1, 1, 1.0, 1.0) if facts else None)


def test_a_rack_without_autoscaling_has_macs_awake_and_lost() -> None:
    members = [member("head", facts=False), member("a"), member("b"), member("c", alive=False)]
    assert macs_by_state([], members) == {"awake": 2, "lost": 1}


def test_where_there_is_no_rack_nothing_is_told() -> None:
    assert macs_by_state([], [member("head", facts=False)]) == {}
    assert macs_page({}) == ""


@pytest.mark.parametrize(
    ("told", "alive", "counted"),
    [
        (Power.AWAKE, True, "awake"),
        (Power.AWAKE, False, "lost"),
        (Power.AWAKE, None, "lost"),
        (Power.ASLEEP, None, "asleep"),
        (Power.ASLEEP, False, "asleep"),
        (Power.ASLEEP, True, "awake"),  # somebody pressed a key
        (Power.WAKING, None, "waking"),
        (Power.WAKING, True, "awake"),
        (Power.RETIRING, True, "going to sleep"),
        (Power.SET_ASIDE, None, "set aside"),
        (Power.SET_ASIDE, True, "awake"),
    ],
)
def test_what_is_told_and_what_ray_knows_make_one_state(told: Power, alive: bool | None, counted: str) -> None:
    members = [] if alive is None else [member("a", alive)]
    found = macs_by_state([mac("a", told)], members)
    assert found == {"awake": 0, "asleep": 0, "waking": 0, "going to sleep": 0, "set aside": 0, "lost": 0} | {
        counted: 1
    }


def test_a_mac_that_joined_and_is_in_no_file_counts_as_well() -> None:
    found = macs_by_state([mac("a", Power.ASLEEP)], [member("guest"), member("other", alive=False)])
    assert (found["asleep"], found["awake"], found["lost"]) == (1, 1, 1)


def test_the_page_of_macs_is_prometheus_text() -> None:
    page = macs_page(macs_by_state([mac("a", Power.RETIRING)], [member("a"), member("b")]))
    (family,) = text_string_to_metric_families(merge([page, PAGE_2]).split("# HELP steps")[0])
    assert (family.name, family.type) == ("pomarium_macs", "gauge")
    assert {s.labels["state"]: s.value for s in family.samples if s.value} == {"awake": 1.0, "going to sleep": 1.0}


def test_no_proxy_of_the_environment_is_asked_for_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(monkeypatch) as proxy, serving(Stub()) as url:
        assert asyncio.run(fetched([f"{url}/v1/models", f"{url}/none"])) == ['{"data":[]}']
    assert proxy.asked == []
