"""How the ssh client is called, and through the shells that Macs have: with stand-ins for it and no server."""

import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from ssh_hosts import LIMIT_S, PART_S, SHORT_S, alive, eventually, stand_in, told

from pomarium.cluster.autoscaling.ssh import (
    CommandError,
    NoAnswerError,
    SshError,
    SshHost,
    command_line,
    run,
    run_and_part,
)

pytestmark = pytest.mark.e2e


def test_the_client_asks_nothing_and_ends_by_itself() -> None:
    plain = SshHost(None, "mini-1")
    assert str(plain) == "mini-1"
    line = command_line(plain, ("pmset", "-g", "a b"), 2.1)
    assert line[0] == "ssh"
    assert line[-3:] == ["--", "mini-1", "pmset -g 'a b'"]
    options = {line[at + 1] for at, word in enumerate(line) if word == "-o"}
    assert {"BatchMode=yes", "ConnectTimeout=3", "StrictHostKeyChecking=accept-new"} <= options
    assert not {"-l", "-i"} & set(line)


def test_a_host_s_own_options_come_first() -> None:
    """For ssh takes the first value of an option."""
    host = SshHost("rack", "mini-1", 2200, ("ConnectTimeout=9",), Path("key"))
    line = command_line(host, ("true",), 0.1)
    assert line.index("ConnectTimeout=9") < line.index("ConnectTimeout=1")
    assert [line[line.index(flag) + 1] for flag in ("-l", "-p", "-i")] == ["rack", "2200", "key"]


SHELLS = ("sh", "dash", "bash", "bash --posix", "zsh")


@pytest.mark.parametrize("inner", ["sh", "dash", "bash --posix"])
@pytest.mark.parametrize("login", SHELLS)
def test_login_shells_and_what_they_print(
    login: str, inner: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Mac's login shell is zsh, its /bin/sh is bash."""
    for shell in (login, inner):
        if shutil.which(shell.split()[0]) is None:
            pytest.skip(f"no {shell} here")
    stand_in(
        monkeypatch, tmp_path,
        f'for last; do :; done; echo Welcome.; echo Welcome. >&2; exec {login} -c "{inner} ${{last#/bin/sh}}"',
    )  # fmt: skip
    host, words = SshHost("rack", "mini-1"), ("a b", "$HOME", "x\ny", "'", '"')
    assert run(host, ("printf", r"%s\0", *words), LIMIT_S).split("\0")[:-1] == list(words)
    with pytest.raises(CommandError, match="exit status 1: it says nothing"):
        run(host, ("false",), LIMIT_S)
    run_and_part(host, ("true",), PART_S)


def test_a_login_that_runs_no_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "echo This account is not available.; exit 1")
    with pytest.raises(SshError, match=r"^No command could be given to rack@mini-1: ssh ended with status 1\.$"):
        run(SshHost("rack", "mini-1"), ("true",), LIMIT_S)


def test_output_that_something_else_holds_open_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a shared connection that ssh leaves in the background."""
    pid_file = tmp_path / "pid"
    stand_in(monkeypatch, tmp_path, f"sleep 100 & echo $! >{shlex.quote(str(pid_file))}; exit 255")
    began = time.monotonic()
    with pytest.raises(SshError, match="ssh ended with status 255"):
        run(SshHost("rack", "mini-1"), ("true",), LIMIT_S)
    assert time.monotonic() - began < LIMIT_S / 2
    os.kill(told(pid_file), signal.SIGKILL)


def test_what_the_client_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a ProxyCommand of ssh's configuration."""
    pid_file = tmp_path / "pid"
    stand_in(monkeypatch, tmp_path, f"sleep 100 & echo $! >{shlex.quote(str(pid_file))}; wait")
    with pytest.raises(NoAnswerError, match=r"rack@mini-1 does not answer ssh \(not within 1 s\)"):
        run(SshHost("rack", "mini-1"), ("true",), SHORT_S)
    assert eventually(lambda: not alive(told(pid_file)))
