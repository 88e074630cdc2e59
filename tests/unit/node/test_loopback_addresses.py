"""A simulated rack where the machine has 127.0.0.1 alone, as macOS has: a network namespace with a `lo` cut to that."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import ip, namespace_or_skip

from pomarium.cluster.node import ports
from pomarium.cluster.rack.simulate import HEAD_ADDRESS


@pytest.fixture
def alone() -> Iterator[str]:
    with namespace_or_skip("pmlo") as name:
        ip("-netns", name, "link", "set", "lo", "up")
        ip("-netns", name, "address", "delete", "127.0.0.1/8", "dev", "lo")
        ip("-netns", name, "address", "add", "127.0.0.1/32", "dev", "lo")
        yield name


def python(namespace: str, program: str, state: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", program],
        env={**os.environ, "XDG_STATE_HOME": str(state), "XDG_CONFIG_HOME": str(state)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


UP = "from pomarium.cluster.cli.main import main; main(['rack', 'up', '--simulate', '2'])"


def test_a_simulated_rack_says_first_which_addresses_it_needs(alone: str, tmp_path: Path) -> None:
    done = python(alone, UP, tmp_path)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    needed = [HEAD_ADDRESS, "127.0.0.2", "127.0.0.3"]
    assert re.findall(r"add (\S+)/32 dev lo", lines[0]) == needed
    assert list(tmp_path.iterdir()) == [], "nothing is made before that is known"
    ip("-netns", alone, "address", "add", f"{HEAD_ADDRESS}/32", "dev", "lo")
    assert re.findall(r"add (\S+)/32 dev lo", python(alone, UP, tmp_path).stderr) == needed[1:]


def test_with_the_addresses_that_it_named_it_is_content(alone: str, tmp_path: Path) -> None:
    needed = re.search(r"`(.+)`", python(alone, UP, tmp_path).stderr)
    assert needed is not None
    for command in needed[1].removeprefix("sudo ").split(" && sudo "):
        subprocess.run(["ip", "netns", "exec", alone, *command.split()], check=True)
    check = "from pomarium.cluster.rack import simulate; simulate.check(simulate.Simulation(2)); print('content')"
    assert python(alone, check, tmp_path).stdout == "content\n"


def test_on_macos_they_are_aliases_of_lo0() -> None:
    assert ports.alias("127.0.0.2", "darwin") == "sudo ifconfig lo0 alias 127.0.0.2"
