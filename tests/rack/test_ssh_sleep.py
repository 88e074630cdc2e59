"""A Mac without an agent is woken by a packet, and told over ssh to join, to leave and to sleep."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ssh_hosts import ADDRESS, SETTLE_S, configure, eventually, running

from pomarium.cluster.autoscaling import sleep, ssh, transport
from pomarium.cluster.autoscaling.wake_on_lan import Target, magic_packet

pytestmark = pytest.mark.e2e


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


ROUSED = "caffeinate -u -t 30\n"


def ways(monkeypatch: pytest.MonkeyPatch, pmset: Path) -> None:
    """What puts the Mac to sleep and rouses it, with the stand-ins beside `pmset`."""
    found = tuple(tuple(str(pmset) if word == sleep.PMSET else word for word in way) for way in sleep.MAC_WAYS)
    monkeypatch.setattr(sleep, "MAC_WAYS", found)
    monkeypatch.setattr(sleep, "ROUSE", "caffeinate -u -t 30")


def test_a_mac_without_an_agent_is_woken_told_to_join_and_put_to_sleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter hears the packet, its sshd starts; `pomarium` and `pmset` there write down what they are told."""
    made, told = configure(tmp_path), tmp_path / "told"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = script(bin_folder / "pomarium", f'echo "$@" >> {told}')
    pmset = script(bin_folder / "pmset", f'echo pmset "$@" >> {told}; kill -9 "$(cat {made.folder}/pid)"')
    script(bin_folder / "sudo", '[ "$1" = -n ] && shift && exec "$@"')
    script(bin_folder / "caffeinate", f'echo caffeinate "$@" >> {told}.roused')
    ways(monkeypatch, pmset)
    with (made.folder / "sshd_config").open("a") as config:
        config.write(f"SetEnv PATH={bin_folder}:/usr/bin:/bin\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as adapter, ThreadPoolExecutor() as pool:
        adapter.bind((ADDRESS, 0))
        adapter.settimeout(SETTLE_S)
        target = Target("02:00:00:00:00:01", ADDRESS)
        way = transport.Ssh(target, adapter.getsockname()[1], made.host, str(program), "10.0.0.1:6379")
        waking = pool.submit(way.wake, lambda: True)
        assert adapter.recv(2048) == magic_packet("02:00:00:00:00:01")
        with running(made.command, made.folder / "log") as mac:
            waking.result(SETTLE_S)
            assert told.read_text() == "rack join 10.0.0.1:6379\n"
            roused = told.with_name("told.roused")
            assert eventually(lambda: roused.exists() and roused.read_text() == ROUSED)
            way.retire()
            assert eventually(lambda: mac.poll() is not None)
    assert told.read_text().splitlines()[1:] == ["rack down", "pmset sleepnow"]


def test_a_mac_that_is_not_let_sleep_joins_again_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS's own do: sudo on standard error, pmset on standard output."""
    made, told = configure(tmp_path), tmp_path / "told"
    program = script(tmp_path / "pomarium", f'echo "$@" >> {told}')
    pmset = script(tmp_path / "pmset", 'echo "Sleep error 0xe00002c1; You must run this as root."; exit 77')
    script(tmp_path / "sudo", 'echo "sudo: a password is required" >&2; exit 1')
    script(tmp_path / "caffeinate", "")
    ways(monkeypatch, pmset)
    with (made.folder / "sshd_config").open("a") as config:
        config.write(f"SetEnv PATH={tmp_path}:/usr/bin:/bin\n")
    way = transport.Ssh(Target("02:00:00:00:00:01", ADDRESS), 9, made.host, str(program), "10.0.0.1:6379")
    with running(made.command, made.folder / "log"):
        assert eventually(lambda: ssh.answers(made.host, 1.0))
        with pytest.raises(sleep.SleepRefusedError) as refusal:
            way.retire()
    assert "a password is required" in str(refusal.value)
    assert "exit status 77: Sleep error 0xe00002c1; You must run this as root" in str(refusal.value)
    assert told.read_text().splitlines() == ["rack down", "rack join 10.0.0.1:6379"]


def test_a_wake_that_is_not_wanted_any_more_ends(tmp_path: Path) -> None:
    way = transport.Ssh(Target("02:00:00:00:00:01", ADDRESS), 9, configure(tmp_path).host, "pomarium", "h:1")
    began = time.monotonic()
    way.wake(lambda: False)
    assert time.monotonic() - began < SETTLE_S
