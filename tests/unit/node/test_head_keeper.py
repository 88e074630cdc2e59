"""A head's process that ends alone is started again. Real processes under the names of Ray's."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rack_serving import until

from pomarium.cluster.cli import main
from pomarium.cluster.node import head_keeper, kin, ray_node
from pomarium.cluster.node.head_keeper import GCS, RAYLET, Command, head_of, keep, launched
from pomarium.cluster.node.kin import Kin
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_node import NodeSpec


class Node:
    """Two processes that sleep."""

    def __init__(self, folder: Path) -> None:
        self.kin = Kin("_POMARIUM_TEST_NODE", str(folder), folder)
        self.started: list[Command] = []
        environ = os.environ | {self.kin.variable: self.kin.value}
        for name in (GCS, RAYLET):
            shutil.copy(shutil.which("sleep") or "", folder / name)
            subprocess.Popen([folder / name, "600"], env=environ, cwd=folder)
        until(lambda: len(kin.names(self.kin)) == 2, 20)

    def process(self, name: str) -> psutil.Process:
        return next(process for process in kin.members(self.kin) if process.name() == name)

    def kept(self) -> threading.Thread:
        def launch(command: Command) -> psutil.Process:
            self.started.append(command)
            return launched(command)

        thread = threading.Thread(target=keep, args=(head_of(self.kin), launch), daemon=True)
        thread.start()
        return thread


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(head_keeper, "LOOK_S", 0.01)
    monkeypatch.setattr(head_keeper, "SETTLE_S", 0.01)
    found = Node(tmp_path)
    try:
        yield found
    finally:
        kin.kill(found.kin)


def test_it_is_started_as_it_was(node: Node) -> None:
    keeper, before = node.kept(), node.process(GCS)
    line, folder = before.cmdline(), before.cwd()
    before.kill()
    until(lambda: GCS in kin.names(node.kin), 20)
    after = node.process(GCS)
    assert (after.cmdline(), after.cwd()) == (line, folder)
    assert after.pid != before.pid
    node.process(RAYLET).kill()
    keeper.join(20)
    assert not keeper.is_alive(), "it ends with the node"
    assert len(node.started) == 1


def test_a_node_that_ends_as_a_whole_is_left_alone(node: Node) -> None:
    keeper = node.kept()
    kin.kill(node.kin)
    keeper.join(20)
    assert not keeper.is_alive()
    assert kin.names(node.kin) == []


def test_one_that_ends_at_once_is_given_up(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    def useless(command: Command) -> psutil.Process:
        node.started.append(command)
        return launched(replace(command, line=["true"]))

    keeper = threading.Thread(target=keep, args=(head_of(node.kin), useless), daemon=True)
    keeper.start()
    node.process(GCS).kill()
    keeper.join(20)
    assert not keeper.is_alive()
    assert len(node.started) <= head_keeper.MOST_SHORT
    assert "it is given up" in capsys.readouterr().out


def test_only_a_head_that_keeps_its_state_writes_it() -> None:
    membership = Membership("ab12", "10.0.0.1:6379", "f" * 64)
    head = NodeSpec("box", "10.0.0.2", Path("/tmp/pm-x/0"), head=True, worker=False)
    for keeps in (True, False):
        command = " ".join(ray_node.command(replace(head, keeps=keeps), membership))
        assert ('"gcs_storage": "rocksdb", "gcs_storage_path": "/tmp/pm-x/0/head"' in command) is keeps


@pytest.mark.parametrize("more", [[], ["--simulate", "2"]])
def test_a_mac_cannot_keep_it(
    more: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("pomarium.cluster.cli.rack_options.sys.platform", "darwin")
    assert main.main(["rack", "up", "--keep-state", *more]) == 1
    assert "--keep-state needs a head on Linux" in capsys.readouterr().err
