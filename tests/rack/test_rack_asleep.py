"""A rack asleep behind an endpoint: a request wakes a Mac, is answered, and the Mac sleeps when nobody asks any more.

All is real but the Macs: magic packets, agents, Ray's autoscaler, Serve's scaling, engine. In order, on one server.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIStatusError
from rack_serving import Rack, answer, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

IDLE_S, KEEP_S = 6, 4
WAKE_S = 240.0
"""A Mac, a node, and an engine from nothing, on two cores that others use."""


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with tempfile.TemporaryDirectory(prefix="pma", dir="/tmp") as state:
        config = tmp_path_factory.mktemp("config")
        up, serve = ["--simulate", "2", "--sleep", f"{IDLE_S}s"], ["--replicas", "0-1", "--keep", f"{KEEP_S}s"]
        with serving(Path(state), config, up, serve) as rack:
            yield rack


def states(rack: Rack) -> dict[str, str]:
    return {mac["name"]: mac["state"] for mac in rack.status()["macs"]}


def shown(rack: Rack) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pomarium.cluster.cli.main", "rack", "status"]
    return subprocess.run(command, env=rack.environ, capture_output=True, text=True, check=False, timeout=60)


def all_asleep(rack: Rack) -> None:
    rack.until(lambda: set(states(rack).values()) == {"asleep"}, 90)


def health(rack: Rack) -> tuple[int, str]:
    status, text = rack.health()
    return status, json.loads(text)["models"]["smollm2"]


def test_nobody_is_awake_and_that_is_well(rack: Rack) -> None:
    found = shown(rack)
    assert found.returncode == 0, found.stderr
    assert "0 of 2 Macs alive, 2 asleep" in found.stdout
    assert "no model is served" in found.stdout
    assert health(rack) == (200, "asleep")
    time.sleep(3)
    assert set(states(rack).values()) == {"asleep"}, "to ask for health wakes a Mac"


def test_requests_wake_one_mac_and_are_all_answered(rack: Rack) -> None:
    answers: list[str] = []
    clients = [threading.Thread(target=lambda: answers.append(answer(rack))) for _ in range(3)]
    for client in clients:
        client.start()
    rack.until(lambda: health(rack) == (200, "waking"), 30)
    for client in clients:
        client.join(WAKE_S)
    assert answers == ["The capital of France is Paris."] * 3
    assert sorted(states(rack).values()) == ["alive", "asleep"]
    assert "1 of 2 Macs alive, 1 asleep" in shown(rack).stdout
    assert health(rack) == (200, "ok")


def test_no_mac_sleeps_under_a_request_that_takes_long(rack: Rack) -> None:
    began = time.monotonic()
    while time.monotonic() - began < KEEP_S + IDLE_S + 8:
        stream = rack.client().completions.create(
            model="smollm2",
            prompt="Once upon a time",
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        *_, last = stream
        assert last.usage is not None
        assert last.usage.completion_tokens == 400
    assert "alive" in states(rack).values()


def test_when_nobody_asks_any_more_it_sleeps_and_wakes_again(rack: Rack) -> None:
    all_asleep(rack)
    rack.until(lambda: rack.status()["replicas"] == [], 20)  # what it told last gets old
    assert health(rack) == (200, "asleep")
    client = rack.client().with_options(timeout=WAKE_S)
    done = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=1, temperature=0)
    assert done.choices[0].text == " Paris"


def test_where_nobody_can_be_woken_the_request_is_told(rack: Rack) -> None:
    """The autoscaler is gone, so nobody wakes anybody: what is asleep is not offered any more."""
    all_asleep(rack)
    (monitor,) = [pid for pid, line in processes(rack) if "autoscaler/v2/monitor.py" in line]
    subprocess.run(["kill", "-9", str(monitor)], check=True)
    rack.until(lambda: "asleep" not in states(rack).values(), 60)  # what it told gets old
    began = time.monotonic()
    with pytest.raises(APIStatusError, match="No Mac of the rack is free") as caught:
        answer(rack)
    assert caught.value.status_code == 503
    assert time.monotonic() - began < 60
    assert health(rack)[0] == 503


def processes(rack: Rack) -> list[tuple[int, str]]:
    from pomarium.cluster.node import kin, ray_node

    head = rack.simulated.current.nodes[0]
    members = kin.members(ray_node.kin_of(head, rack.simulated.current.membership.session))
    return [(process.pid, " ".join(process.cmdline())) for process in members]
