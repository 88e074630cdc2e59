"""The limit on open files: what is asked for, what a system refuses, and that commands begin with it."""

import errno
import plistlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.machine import descriptors
from pomarium.cluster.machine.descriptors import SAFE, WANTED, candidates, raise_limit

INFINITY = resource.RLIM_INFINITY
LAUNCHD = Path(__file__).parents[3] / "deploy/launchd"


@given(st.integers(0, 1 << 20) | st.just(INFINITY), st.integers(0, 1 << 20) | st.just(INFINITY))
def test_it_is_only_ever_raised_and_never_beyond_the_hard_limit(soft: int, hard: int) -> None:
    for limit in candidates(soft, hard):
        assert soft < limit <= WANTED
        assert hard == INFINITY or limit <= hard


class System:
    """setrlimit as macOS has it: more than `most` is refused, whatever the hard limit says."""

    def __init__(self, soft: int, hard: int, most: int) -> None:
        self.limits, self.most = (soft, hard), most

    def get(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.limits

    def put(self, which: int, limits: tuple[int, int]) -> None:
        if limits[0] > self.most:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.limits = limits


@pytest.mark.parametrize(
    ("system", "then"),
    [
        (System(256, INFINITY, 245760), WANTED),
        (System(256, INFINITY, 10240), SAFE),
        (System(256, 4096, 245760), 4096),
        (System(256, INFINITY, 256), 256),
        (System(100_000, INFINITY, 245760), 100_000),
    ],
)
def test_a_mac_gives_what_it_can(system: System, then: int) -> None:
    hard = system.limits[1]
    assert raise_limit(system.get, system.put) == then
    assert system.limits == (then, hard)


def test_a_command_begun_with_256_has_more() -> None:
    program = (
        "import resource; from pomarium.cluster.cli.main import main\n"
        "main(['rack', 'check', '/no/such/file']); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run(
        ["bash", "-c", f"ulimit -S -n 256; exec '{sys.executable}' -c \"$0\"", program],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(done.stdout) == max(candidates(256, hard))


@pytest.mark.parametrize("job", ["head", "serve", "worker"])
def test_jobs_of_launchd_begin_with_more(job: str) -> None:
    found = plistlib.loads((LAUNCHD / f"org.pomarium.{job}.plist").read_bytes())
    assert found["SoftResourceLimits"]["NumberOfFiles"] >= descriptors.SAFE
