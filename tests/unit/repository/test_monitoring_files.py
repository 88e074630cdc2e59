"""Prometheus takes our files, each alarm is explained, and the dashboard shows what an operator asks for."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from monitoring import DASHBOARD, DEPLOY, alarms, dashboard_queries, panels, tool

OPERATIONS = (Path(__file__).parents[3] / "docs/operations.md").read_text()


def test_every_alarm_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \|", OPERATIONS, re.MULTILINE))
    assert explained == set(alarms())


def test_prometheus_takes_our_files() -> None:
    promtool = tool("promtool")
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        result = subprocess.run([promtool, "check", kind, DEPLOY / name], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_each_panel_says_what_it_shows_and_in_which_unit() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 38, "Grafana 10"
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    places = set()
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert "{{" in target["legendFormat"] or panel["type"] == "stat", panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        places.add((place["x"], place["y"]))
    assert len(places) == len(panels()), "two panels in one place"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["DS_PROMETHEUS", "model"]


SHOWN = ("request_success", "generation_tokens", "time_to_first_token", "inter_token", "kv_cache_usage", "prefix_cache",
         "pomarium_macs", "step_seconds", "handing_seconds", "waited_seconds")  # fmt: skip


@pytest.mark.parametrize("series", SHOWN)
def test_the_dashboard_shows_what_an_operator_asks_for(series: str) -> None:
    assert any(series in query for query in dashboard_queries().values())
