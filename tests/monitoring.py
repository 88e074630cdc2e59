"""Queries of the dashboard and of the alarms, and a real Prometheus to ask them: Debian's, where it is installed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana/pomarium.json"
WINDOW = "30s"
"""For Grafana's $__rate_interval. Ray's agents are told of a process's figures every 10 s."""


def tool(name: str) -> str:
    """Path of Prometheus' `name`. Skips the test where it is not installed, but not in CI on Linux."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI") and sys.platform == "linux":
            pytest.fail(f"{name} is not installed: apt-get install --no-install-recommends prometheus")
        pytest.skip(f"{name} is not installed")
    return found


def panels() -> list[dict[str, Any]]:
    """Those of the dashboard that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def dashboard_queries() -> dict[str, str]:
    """`panel: legend` -> query, as Grafana would send it with all models chosen."""
    return {
        f"{panel['title']}: {target['legendFormat']}": filled(target["expr"])
        for panel in panels()
        for target in panel["targets"]
    }


def filled(query: str) -> str:
    """`query` with Grafana's variables replaced. Fails if one is left."""
    found = query.replace("$__rate_interval", WINDOW).replace("$model", ".*")
    assert "$" not in found, found
    return found


def alarms() -> dict[str, str]:
    """Name -> expression."""
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def undecided(expression: str) -> str:
    """An alarm's expression that gives 0 or 1, where the alarm's own gives nothing while all is well.

    Its windows are shortened, for what it looks at has not run for minutes.
    """
    found, count = re.subn(r" (==|>|<) ", r" \1 bool ", expression)
    assert count == 1, f"{expression}: not one comparison"
    return re.sub(r"\[\d+m\]", f"[{WINDOW}]", found)


@dataclass(frozen=True)
class Prometheus:
    """One that runs. `url`: of its HTTP API."""

    url: str

    def query(self, expression: str) -> list[float]:
        """Values of an instant query. Fails if Prometheus refuses it."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        assert answer["data"]["resultType"] == "vector", expression
        assert not answer.get("warnings"), f"{expression}: {answer}"
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes, and how that went."""
        answer = httpx.get(f"{self.url}/api/v1/targets", timeout=10).json()
        found: list[dict[str, Any]] = answer["data"]["activeTargets"]
        return found


@contextmanager
def prometheus(folder: Path, endpoint: str, key: str) -> Iterator[Prometheus]:
    """Prometheus with deploy/prometheus.yml, but for address, key and interval, while the context is open.

    Args:
        folder: for its data. endpoint: HOST:PORT. key: that the endpoint asks for.
    """
    config = folder / "prometheus.yml"
    (folder / "pomarium.key").write_text(f"{key}\n")
    shutil.copy(DEPLOY / "alerts.yml", folder / "alerts.yml")
    config.write_text(configured((DEPLOY / "prometheus.yml").read_text(), endpoint, folder / "pomarium.key"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while not _ready(url):
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline, "Prometheus is not ready"
            time.sleep(0.2)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(20)


def configured(text: str, endpoint: str, key_file: Path) -> str:
    """deploy/prometheus.yml as a user would change it for `endpoint` and its key; faster, for the test's sake."""
    changes = {
        "127.0.0.1:8000": endpoint,
        "    # authorization:": "    authorization:",
        "    #   credentials_file: /etc/prometheus/pomarium.key": f"      credentials_file: {key_file}",
        "scrape_interval: 15s": "scrape_interval: 2s",
        "scrape_timeout: 10s": "scrape_timeout: 2s",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, f"deploy/prometheus.yml has not one {old!r}"
        text = text.replace(old, new)
    return text


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
