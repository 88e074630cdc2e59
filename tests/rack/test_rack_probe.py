"""`pomarium rack probe`: what it prints, and what it measures between two raylets on loopback addresses.

Both run in one fixture; their workers get certificates through POMARIUM_TLS, as on Macs that joined a rack.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.cli.rack_probe import names_of
from pomarium.cluster.executor.survey import RackNode
from pomarium.cluster.machine.units import parse_duration, parse_rate
from pomarium.cluster.node import ports
from pomarium.cluster.placement.model import Mac
from pomarium.cluster.rack import inventory
from pomarium.cluster.rack.identity import RackKey, ray_token, write_tls
from pomarium.cluster.rack.labels import MacFacts, labels_of
from pomarium.cluster.rack.link_report import Measured, directions, duration, entry, header, rate, row
from pomarium.worker.handoff.probe import LinkFacts

MACS = """
macs:
  - {name: studio-1, address: 127.0.0.61, memory: 64GiB, chip: M4 Max}
  - {name: studio-2, address: 127.0.0.62, memory: 64GiB, chip: M4 Max}
  - {name: mini-1, address: 127.0.0.63, memory: 64GiB, chip: M4 Max}
"""
NAMES = ("studio-1", "studio-2", "mini-1")
START_S = 80.0


# --- what is printed ------------------------------------------------------------------------------------------------


@given(st.floats(1e3, 1e14))
def test_a_rate_is_read_back(bytes_per_s: float) -> None:
    assert parse_rate(rate(bytes_per_s)) == pytest.approx(bytes_per_s, rel=1e-2)


@given(st.floats(1e-6, 3600))
def test_a_duration_is_read_back(seconds: float) -> None:
    assert parse_duration(duration(seconds)) == pytest.approx(seconds, rel=1e-3)


def test_each_pair_is_measured_both_ways() -> None:
    assert directions("abc") == (("a", "b"), ("b", "a"), ("a", "c"), ("c", "a"), ("b", "c"), ("c", "b"))


def test_the_entry_is_what_rack_yaml_reads() -> None:
    measured = [
        Measured("studio-2", "studio-1", LinkFacts(0.0002, 5e9)),
        Measured("studio-1", "studio-2", LinkFacts(0.0003, 4e9)),
        Measured("studio-1", "mini-1", LinkFacts(0.0006, 1.25e8)),
        Measured("mini-1", "studio-1", "it did not answer"),
        Measured("mini-1", "studio-2", LinkFacts(0.0006, 1.25e8)),
        Measured("studio-2", "mini-1", LinkFacts(0.0006, 1.1e8)),
    ]
    links = inventory.parse(f"{MACS}\n{entry(measured, NAMES)}\n").links
    assert [(set(pair.between), pair.bandwidth, pair.latency) for pair in links.pairs] == [
        ({"studio-1", "studio-2"}, pytest.approx(4e9), pytest.approx(0.0001)),
        ({"studio-2", "mini-1"}, pytest.approx(1.1e8), pytest.approx(0.0003)),
    ]


def test_nothing_measured_is_no_entry() -> None:
    assert entry([Measured("a", "b", "no"), Measured("b", "a", LinkFacts(1, 1))], ("a", "b")) == ""


def test_the_table_has_columns() -> None:
    good = row(Measured("studio-1", "a", LinkFacts(0.000312, 1.17e9)), ("studio-1", "a"))
    assert good == "studio-1  a             312 us    9.36Gb/s"
    assert len(header(("studio-1", "a"))) == len(good)
    assert row(Measured("a", "b", "no route"), ("a", "b")) == "a     b     not measured: no route"


def test_names_are_those_of_rack_yaml_and_unique() -> None:
    nodes = [node("127.0.0.61", "x"), node("127.0.0.9", "y"), node("127.0.0.10", "y"), node("127.0.0.11", "z")]
    assert names_of(nodes, inventory.parse(MACS)) == ("studio-1", "127.0.0.9", "127.0.0.10", "z")
    assert names_of(nodes[:2], None) == ("x", "y")


def node(address: str, name: str) -> RackNode:
    return RackNode(address, address, Mac(name, 1 << 30, 1e11, 1e12), 1, 1, False)


# --- two raylets ----------------------------------------------------------------------------------------------------

PROBE = """
import argparse, sys
from pomarium.cluster.cli import rack_probe
from pomarium.worker.errors import PomariumError
parser = argparse.ArgumentParser()
rack_probe.add_parser(parser.add_subparsers())
args = parser.parse_args(["probe", *sys.argv[1:]])
try:
    sys.exit(args.run(args))
except PomariumError as error:
    sys.exit(f"pomarium: {error}")
"""

OCCUPY = """
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR")

@ray.remote(num_cpus=0, resources={"mlx": 1}, lifetime="detached")
class Model:
    def serves(self):
        return True

models = [Model.options(name=str(n)).remote() for n in range(2)]
assert all(ray.get([model.serves.remote() for model in models], timeout=60))
"""


@dataclass(frozen=True)
class Rack:
    """Two Macs, all of whose `mlx` is taken.

    Attributes:
        environ: of a driver. tls: the folder of the second Mac's certificate.
    """

    key: RackKey
    environ: dict[str, str]
    tls: Path


@pytest.fixture(scope="module")
def rack() -> Iterator[Rack]:
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as folder:
        key, address = RackKey.generate(), f"127.0.0.61:{ports.free(1)[0]}"
        common = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POMARIUM_"))}
        common |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_token(key)}
        common |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOME": folder,
            "XDG_STATE_HOME": folder,
        }  # and no rack of the user's
        head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
        raylets = []
        try:
            for name, ip, place in (
                ("studio-1", "127.0.0.61", head),
                ("studio-2", "127.0.0.62", [f"--address={address}"]),
            ):
                tls = Path(folder) / f"tls-{name}"
                write_tls(key, tls)
                raylets.append(_start(ip, name, place, common | {"POMARIUM_TLS": str(tls)}))
                _await_start(Path(folder) / f"{name}.log")  # one by one: each keeps two cores busy
            driver = common | {"RAY_ADDRESS": address}
            occupied = _python(OCCUPY, driver)
            assert occupied.returncode == 0, occupied.stderr
            yield Rack(key, driver, tls)
        finally:
            _stop(raylets)


@pytest.mark.e2e
def test_links_of_a_running_rack(rack: Rack, tmp_path: Path) -> None:
    (tmp_path / "rack.yaml").write_text(MACS)
    result = _python(PROBE, rack.environ, "--seconds", "0.3", "--rack", str(tmp_path / "rack.yaml"))
    assert result.returncode == 0, result.stderr
    table, links, absent = result.stdout.strip().split("\n\n")
    lines = table.splitlines()
    assert re.fullmatch(r"from +to +round trip +bandwidth", lines[0])
    assert [tuple(line.split()[:2]) for line in lines[1:]] == [("studio-1", "studio-2"), ("studio-2", "studio-1")]
    assert all(re.fullmatch(r"studio-. +studio-. +[\d.,]+ [mu]s +[\d.]+[GM]b/s", line) for line in lines[1:])
    (pair,) = inventory.parse(f"{MACS}\n{links}").links.pairs
    assert pair.between == ("studio-1", "studio-2")
    assert 1e6 < pair.bandwidth < 1e11
    assert 1e-6 < pair.latency < 0.1
    assert absent == "not running: mini-1"


@pytest.mark.e2e
def test_a_mac_with_another_certificate_is_not_measured(rack: Rack) -> None:
    write_tls(RackKey.generate(), rack.tls)
    try:
        result = _python(PROBE, rack.environ, "--seconds", "0.3")
    finally:
        write_tls(rack.key, rack.tls)
    assert result.returncode == 1
    lines = result.stdout.strip().splitlines()[1:]
    assert len(lines) == 2, result.stdout + result.stderr
    assert all(re.search("not measured: 127.* did not answer the probe", line) for line in lines)


@pytest.mark.e2e
def test_an_identity_that_cannot_be_read_is_named(rack: Rack) -> None:
    away = rack.tls.rename(rack.tls.with_name("away"))
    try:
        result = _python(PROBE, rack.environ)
    finally:
        away.rename(rack.tls)
    assert result.returncode == 1
    assert f"pomarium: studio-2: The rack's identity cannot be read: {rack.tls}" in result.stderr


@pytest.mark.e2e
def test_no_rack_is_a_users_fault(rack: Rack) -> None:
    result = _python(PROBE, {name: value for name, value in rack.environ.items() if name != "RAY_ADDRESS"})
    assert result.returncode == 1
    assert result.stderr.startswith("pomarium: No rack is up on this machine")
    result = _python(PROBE, rack.environ | {"RAY_ADDRESS": "127.0.0.61:1"})
    assert result.stderr.startswith("pomarium: No Ray answers at RAY_ADDRESS=127.0.0.61:1")


def _start(ip: str, name: str, place: list[str], environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    facts = MacFacts(name, "M4 Max", 64 << 30, 32 << 30, 4e11, 1e13)
    labels = ",".join(f"{key}={value}" for key, value in labels_of(facts).items())
    options = ["--block", f"--node-ip-address={ip}", "--num-cpus=1", "--num-gpus=0", '--resources={"mlx": 1}']
    options += [f"--labels={labels}", "--object-store-memory=80000000"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *place]
    with (Path(environ["RAY_TMPDIR"]) / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, env=dict(environ), stdout=log, stderr=log, start_new_session=True)


def _stop(raylets: "list[subprocess.Popen[bytes]]") -> None:
    """Ends what was started here, and what that started."""
    started = []
    for raylet in raylets:
        with contextlib.suppress(psutil.NoSuchProcess):
            started += psutil.Process(raylet.pid).children(recursive=True)
    for raylet in reversed(raylets):
        raylet.terminate()
    for raylet in raylets:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raylet.wait(15)
        raylet.kill()
    for left in psutil.wait_procs(started, timeout=5)[1]:
        left.kill()


def _python(script: str, environ: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=150)


def _await_start(log: Path) -> None:
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)
