"""A rack of three simulated Macs, driven through `pomarium rack` as a user would: one after the other, on one rack."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import names_probe_run
import psutil
import pytest

from pomarium.cluster.machine.descriptors import SAFE
from pomarium.cluster.node import kin, ray_node
from pomarium.cluster.rack import current
from pomarium.cluster.rack.placement_inputs import PROCESS_BYTES
from pomarium.cluster.rack.simulate import HEAD, SimulatedRack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
SEEN_S = 10.0
"""A Mac whose power or cable is lost is known to be lost within 8 s."""

DRIVER = """
import json, os, time
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as At
from pomarium.cluster.executor.survey import survey
from pomarium.cluster.rack import reports
from pomarium.cluster.rack.labels import NAME_LABEL

ray.init(logging_level="ERROR", log_to_driver=False)
names = ["mac-3", "mac-1", "mac-2"]
group = placement_group([{"mlx": 1}] * 3, "STRICT_SPREAD", bundle_label_selector=[{NAME_LABEL: n} for n in names])
assert group.wait(60)

@ray.remote(num_cpus=0, resources={"mlx": 1})
def look():
    limit, cores = os.environ["POMARIUM_MACHINE_MEMORY"], sorted(os.sched_getaffinity(0))
    return [ray.util.get_node_ip_address(), limit, os.nice(0), cores]

workers = ray.get([look.options(scheduling_strategy=At(group, i)).remote() for i in range(3)], timeout=60)
stages = tuple(reports.StageReport(f"mac-{i + 1}", 10 * i, 10 * i + 10, 100 + i, 1 << 30) for i in range(3))
for replica, age in (("fresh", 0), ("silent", 60), ("ended", 0)):
    figures = (42.5, 2, 1, 6.0, 0.5, 0.5)
    reports.publish(reports.ReplicaReport("smollm2", replica, 30, stages, (), *figures, time.time() - age))
reports.withdraw("ended")
head = ray.util.get_node_ip_address()
print(json.dumps({"head": head, "workers": workers, "survey": [[n.mac.name, n.mac.memory, n.free] for n in survey()]}))
"""

NAMES_DRIVER = """
import json
import names_probe, ray
from ray import cloudpickle

cloudpickle.register_pickle_by_value(names_probe)
ray.init(logging_level="ERROR", log_to_driver=False)
print(json.dumps(ray.get(ray.remote(num_cpus=0, resources={"mlx": 1})(names_probe.probe).remote(), timeout=100)))
"""


def rack(environ: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """With as few open files as macOS gives a terminal."""
    command = ["bash", "-c", 'ulimit -S -n 256; exec "$@"', "bash", sys.executable]
    command += ["-m", "pomarium.cluster.cli.main", "rack", *arguments]
    return subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=300, check=False)


def status(environ: Mapping[str, str]) -> dict[str, Any]:
    done = rack(environ, "status", "--json")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def alive(environ: Mapping[str, str]) -> dict[str, bool]:
    return {mac["name"]: mac["alive"] for mac in status(environ)["macs"]}


def await_loss(environ: Mapping[str, str], name: str) -> None:
    deadline = time.monotonic() + SEEN_S
    while alive(environ)[name]:
        assert time.monotonic() < deadline, f"{name} still counts as alive after {SEEN_S} s"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = str(tmp_path_factory.mktemp("rack"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POMARIUM_"))}
    environ |= {"XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}
    cores = sorted(os.sched_getaffinity(0))
    held = f"{cores[0]},{cores[-1]},{cores[0]}"
    up = rack(environ, "up", "--simulate", "3", "--memory", "3GiB,2GiB,2GiB", "--cpus", held)
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        yield environ
    finally:
        rack(environ, "down")


def running(environ: Mapping[str, str]) -> SimulatedRack:
    recorded = current.current(environ)
    assert recorded is not None
    return SimulatedRack(recorded, environ)


def test_the_macs_are_there_with_their_facts(environ: dict[str, str]) -> None:
    found = status(environ)
    assert found["simulated"] is True
    assert [(m["name"], m["address"], m["alive"], m["memory"], m["model_memory"]) for m in found["macs"]] == [
        ("mac-1", "127.0.0.2", True, 3 * GIB, 3 * GIB - PROCESS_BYTES),
        ("mac-2", "127.0.0.3", True, 2 * GIB, 2 * GIB - PROCESS_BYTES),
        ("mac-3", "127.0.0.4", True, 2 * GIB, 2 * GIB - PROCESS_BYTES),
    ]


def test_every_process_of_a_mac_may_open_more_files_than_macos_gives_a_terminal(environ: dict[str, str]) -> None:
    limits = {
        psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)[0] for mac in running(environ).macs for pid in mac.pids()
    }
    assert limits
    assert min(limits) >= min(SAFE, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def test_a_driver_on_this_machine_places_workers_by_name_and_reports_are_shown(environ: dict[str, str]) -> None:
    """The driver sits on the head, which runs no workers; workers have their Mac's memory and cores."""
    recorded = running(environ)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=environ | recorded.environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["head"] == recorded.current.address.split(":")[0]
    assert seen["survey"] == [
        ["mac-1", 3 * GIB - PROCESS_BYTES, 0],
        ["mac-2", 2 * GIB - PROCESS_BYTES, 0],
        ["mac-3", 2 * GIB - PROCESS_BYTES, 0],
    ]
    cores, nice = sorted(os.sched_getaffinity(0)), os.nice(0)
    assert seen["workers"] == [
        ["127.0.0.4", str(2 * GIB), nice, [cores[0]]],
        ["127.0.0.2", str(3 * GIB), nice, [cores[0]]],
        ["127.0.0.3", str(2 * GIB), nice, [cores[-1]]],
    ]
    found = status(environ)
    assert [replica["replica"] for replica in found["replicas"]] == ["fresh"]
    assert [(s["first"], s["end"], s["model"]) for m in found["macs"] for s in m["stages"]] == [
        (0, 10, "smollm2"), (10, 20, "smollm2"), (20, 30, "smollm2"),
    ]  # fmt: skip
    table = rack(environ, "status")
    assert table.returncode == 0
    assert "smollm2 10-19 of 30, 1 GiB" in table.stdout
    assert "42.5" in table.stdout


def test_a_driver_in_the_checkout_hides_no_names_from_its_workers(environ: dict[str, str], tmp_path: Path) -> None:
    """Ray puts the driver's folder, here the repository root, on its workers' path (tests/unit/repository)."""
    folder = names_probe_run.write(tmp_path)
    joined = environ | running(environ).environment()
    found = names_probe_run.run("-c", NAMES_DRIVER, cwd=ROOT, path=[str(folder)], **joined)
    names_probe_run.check(found, ROOT)


def test_a_second_rack_is_refused(environ: dict[str, str]) -> None:
    again = rack(environ, "up", "--simulate", "1")
    assert again.returncode == 1
    assert "pomarium rack down" in again.stderr


def test_a_live_name_and_a_wrong_key_are_refused(environ: dict[str, str], tmp_path: Path) -> None:
    address = running(environ).current.address
    other = environ | {"XDG_STATE_HOME": str(tmp_path)}
    options = ("--address", "127.0.0.9", "--bandwidth", "1GB/s", "--flops", "1TFLOPS")
    taken = rack(other, "join", address, "--name", "mac-1", *options)
    assert (taken.returncode, "already, at 127.0.0.2" in taken.stderr) == (1, True), taken.stderr
    from pomarium.cluster.rack.identity import RackKey

    wrong = rack(other, "join", address, "--name", "mac-9", "--key", RackKey.generate().text, *options)
    assert (wrong.returncode, "another key" in wrong.stderr) == (1, True), wrong.stderr
    assert set(alive(environ)) == {"mac-1", "mac-2", "mac-3"}


def test_a_killed_mac_is_lost_and_counts_once_when_it_is_back(environ: dict[str, str]) -> None:
    macs = running(environ)
    macs.kill("mac-2")
    assert macs.macs[1].pids() == ()
    await_loss(environ, "mac-2")
    assert rack(environ, "status").returncode == 1
    macs.rejoin("mac-2")
    assert alive(environ) == {"mac-1": True, "mac-2": True, "mac-3": True}


def test_a_frozen_mac_is_lost_and_gives_up_when_it_thaws(environ: dict[str, str]) -> None:
    macs = running(environ)
    macs.freeze("mac-3")
    await_loss(environ, "mac-3")
    macs.thaw("mac-3")
    deadline = time.monotonic() + 20
    while macs.macs[2].pids():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert alive(environ) == {"mac-1": True, "mac-2": True, "mac-3": False}


def test_down_leaves_nothing(environ: dict[str, str]) -> None:
    recorded = running(environ).current
    kins = [ray_node.kin_of(spec, recorded.membership.session) for spec in recorded.nodes]
    assert recorded.nodes[0].name == HEAD
    assert len(kin.members(kins[0])) >= 4
    down = rack(environ, "down")
    assert down.returncode == 0, down.stderr
    assert [process for one in kins for process in kin.members(one)] == []
    assert not recorded.folder.exists()
    assert current.recorded(environ) is None
    assert "no rack was up" in rack(environ, "down").stdout
