"""What tests of ssh talk to: real sshds on loopback, a port where nothing listens, a stand-in for the client.

configure(folder) --> Server, not started: running(server.command, log), await_ssh(server.host)
a command that writes its pid --told--> pid --alive
"""

import contextlib
import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pomarium.cluster.autoscaling import ssh
from pomarium.cluster.autoscaling.ssh import SshHost
from pomarium.cluster.node import ports

ADDRESS = "127.0.0.1"
LIMIT_S = 20.0
PART_S = ssh.SILENCE_S + 20
SHORT_S = 1.0
SETTLE_S = 20.0


@dataclass(frozen=True)
class Server:
    """An sshd of our own. `host`: how a client with the right key reaches it."""

    command: tuple[str, ...]
    folder: Path
    host: SshHost


def sshd() -> str:
    """Path of OpenSSH's server. Skips the test where it is not installed, but not in CI."""
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is not None:
        return found
    if os.environ.get("CI"):
        pytest.fail("no sshd: install openssh-server")
    pytest.skip("no sshd here: install openssh-server")


def new_key(file: Path) -> Path:
    """`file`, and FILE.pub beside it."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", file.name, "-f", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file


def configure(folder: Path) -> Server:
    """Keys and the configuration of an sshd that has not been started."""
    command = (sshd(), "-D", "-e", "-f", str(folder / "sshd_config"))
    if os.geteuid() == 0 and sys.platform == "linux":
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root wants it; the service makes it at boot
    key, port = new_key(folder / "key"), ports.free(1)[0]
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"ListenAddress {ADDRESS}:{port}\nHostKey {new_key(folder / 'host_key')}\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile {folder}/pid\nUsePAM no\nStrictModes no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
    )
    options = (f"UserKnownHostsFile={folder}/known_hosts", "GlobalKnownHostsFile=/dev/null", "IdentityAgent=none")
    host = SshHost(getpass.getuser(), ADDRESS, port, options, key)
    return Server(command, folder, host)


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process, ended with those that it has started."""
    with log.open("ab") as said, subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                begun = psutil.Process(process.pid)
                for one in (begun, *begun.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()


def nobody() -> SshHost:
    """Where nothing listens."""
    return SshHost("rack", ADDRESS, ports.free(1)[0])


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """`script` in the place of the ssh client."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def eventually(holds: Callable[[], object]) -> bool:
    """Whether it holds within SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """A process that has ended may stay in the table where nobody collects it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def told(pid_file: Path) -> int:
    """The pid that a command writes there."""
    assert eventually(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    return int(pid_file.read_text())
