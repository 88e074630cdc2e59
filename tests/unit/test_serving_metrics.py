"""Prometheus pages of several machines become one valid page."""

from prometheus_client.parser import text_string_to_metric_families

from pomarium.cluster.serving.metrics import addresses, merge

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
