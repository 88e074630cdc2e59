"""What listens and connects does so in a network as a Mac's, whose loopback interface has 127.0.0.1 alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INSIDE = (ROOT / "tests/mac_network.sh").as_posix()
HOST_ONLY = "executor/test_executor_stream.py::test_the_service_listens_on_its_host_only"
QUICK = ("node/test_addresses.py", "rack/test_rack_machine.py", "node/test_ray_address.py", HOST_ONLY)
"""Tests that choose addresses. `make test-mac-network` runs all that start no server there."""

BINDS = """
import errno, socket
for address in ("127.0.0.1", "127.0.0.2", "127.0.0.9", "192.168.77.2", "::1"):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
            print(address, "bound")
        except OSError as error:
            print(address, errno.errorcode[error.errno])
"""


def inside(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([INSIDE, *command], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module", autouse=True)
def network() -> None:
    if sys.platform != "linux":
        pytest.skip("on a Mac all tests run in a Mac's network")
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, iproute2 and util-linux")
    done = inside("true")
    if done.returncode != 0:
        pytest.skip(f"this kernel gives no network namespaces: {done.stderr}")


def test_the_network_is_a_mac_s() -> None:
    found = dict(line.split() for line in inside(sys.executable, "-c", BINDS).stdout.splitlines())
    assert found == {"127.0.0.1": "bound", "127.0.0.2": "EADDRNOTAVAIL", "127.0.0.9": "EADDRNOTAVAIL",
                     "192.168.77.2": "bound", "::1": "bound"}  # fmt: skip


ABSENT = """
import sys
from pomarium.cluster.node import ports
from pomarium.worker.errors import SettingsError
sys.platform = "darwin"
ports.check_local("127.0.0.1")
try:
    ports.check_local("127.0.0.9")
except SettingsError as error:
    print(error)
"""


def test_an_address_that_a_mac_lacks_is_added_to_its_loopback() -> None:
    done = inside(sys.executable, "-c", ABSENT)
    assert done.stdout.startswith("127.0.0.9 is not an address of this machine ("), done.stderr
    assert "run `sudo ifconfig lo0 alias 127.0.0.9`" in done.stdout


def test_a_command_s_exit_code_is_told() -> None:
    assert inside("sh", "-c", "exit 7").returncode == 7


def test_what_chooses_addresses_needs_no_other_loopback_address() -> None:
    tests = [f"tests/unit/{name}" for name in QUICK]
    done = inside(sys.executable, "-m", "pytest", "-q", "-rs", "-m", "not e2e", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not re.search(r"SKIPPED.*127\.0\.0", done.stdout), done.stdout[-1000:]
