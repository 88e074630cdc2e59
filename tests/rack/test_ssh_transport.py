"""Commands over ssh to a real sshd on loopback: words, output, ends, keys, time limits, lost connections."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from ssh_hosts import (
    ADDRESS,
    LIMIT_S,
    PART_S,
    SETTLE_S,
    SHORT_S,
    Server,
    alive,
    configure,
    eventually,
    new_key,
    nobody,
    running,
    told,
)

from pomarium.cluster.autoscaling import ssh
from pomarium.cluster.autoscaling.ssh import (
    CommandError,
    CutOffError,
    NotAdmittedError,
    SshHost,
    await_ssh,
    run,
    run_and_part,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """A server and its pid."""
    made = configure(tmp_path_factory.mktemp("sshd"))
    with running(made.command, made.folder / "log") as process:
        await_ssh(made.host, SETTLE_S, 0.05)
        yield made, process.pid


@pytest.fixture
def host(server: tuple[Server, int]) -> SshHost:
    return server[0].host


@pytest.fixture(scope="module")
def short(server: tuple[Server, int]) -> float:
    """Seconds in which a command is begun for certain, however busy this machine is."""
    began = time.monotonic()
    run(server[0].host, ("true",), LIMIT_S)
    return max(SHORT_S, 6 * (time.monotonic() - began))


@pytest.fixture
def sessions(server: tuple[Server, int]) -> Callable[[], list[psutil.Process]]:
    """The processes of the server that hold a connection."""

    def find() -> list[psutil.Process]:
        return [one for one in psutil.Process(server[1]).children(recursive=True) if one.name().startswith("sshd")]

    return find


# --- commands -------------------------------------------------------------------------------------------------------


def test_a_command_s_output_comes_back_as_it_was(host: SshHost) -> None:
    assert run(host, ("printf", r"a\nb"), LIMIT_S) == "a\nb"
    lookalike = "\npomarium:ended 7\npomarium:begun\n"
    assert run(host, ("printf", lookalike), LIMIT_S) == lookalike
    assert run(host, ("printf", r"\377"), LIMIT_S) == "\ufffd"


def test_words_arrive_as_they_are(host: SshHost) -> None:
    text = ["a b", "", "'", '"', "$HOME", "`id`", "a\nb\n", "\\", "\\n", "\t", "ü"]
    signs = ["*", "~", "#", ";", "&&", "!x", "-n", "%s", "(", ">f"]
    assert run(host, ("printf", r"%s\0", *text, *signs), LIMIT_S).split("\0")[:-1] == text + signs


def test_a_command_has_no_input(host: SshHost) -> None:
    assert run(host, ("cat",), LIMIT_S) == ""
    with pytest.raises(CommandError, match="exit status"):
        run(host, ("sh", "-c", "cat <&3"), LIMIT_S)  # nor the connection, which the watcher reads


def test_a_large_output_is_complete(host: SshHost) -> None:
    assert len(run(host, ("head", "-c", "3000000", "/dev/zero"), LIMIT_S)) == 3_000_000


def test_a_command_that_fails_says_how(host: SshHost) -> None:
    with pytest.raises(CommandError) as caught:
        run(host, ("sh", "-c", "echo early >&2; echo disk full. >&2; exit 3"), LIMIT_S)
    assert caught.value.status == 3
    assert str(caught.value).endswith(f" failed on {host} with exit status 3: disk full.")
    with pytest.raises(CommandError, match=r"`no-such-command` failed on .* with exit status 127: .*not found"):
        run(host, ("no-such-command",), LIMIT_S)


@pytest.mark.parametrize("give", [run, run_and_part])
def test_a_command_s_own_255_is_no_lost_connection(host: SshHost, give: Callable[..., object]) -> None:
    with pytest.raises(CommandError, match="exit status 255: it says nothing"):
        give(host, ("sh", "-c", "exit 255"), PART_S)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_that_is_not_authorized(host: SshHost, tmp_path: Path) -> None:
    stranger = replace(host, identity=new_key(tmp_path / "stranger"))
    with pytest.raises(NotAdmittedError) as caught:
        run(stranger, ("true",), LIMIT_S)
    copy = f"ssh-copy-id -i {stranger.identity} -p {host.port} {host.user}@{ADDRESS}"
    assert str(caught.value) == (
        f"{host} does not accept the key {stranger.identity}: add its public half to ~/.ssh/authorized_keys there, "
        f"with `{copy}`."
    )
    own = ("IdentitiesOnly=yes", f"IdentityFile={stranger.identity}")
    with pytest.raises(NotAdmittedError, match=f"a key of this user: .*`ssh-copy-id -p {host.port} "):
        run(replace(host, identity=None, options=(*host.options, *own)), ("true",), LIMIT_S)


def test_a_host_seen_for_the_first_time_is_remembered_and_a_changed_one_refused(host: SshHost, tmp_path: Path) -> None:
    """And the advice helps."""
    known = tmp_path / "known hosts"
    client = replace(host, options=(f'UserKnownHostsFile="{known}"', *host.options[1:]))
    run(client, ("true",), LIMIT_S)
    name, kind, _ = known.read_text().splitlines()[0].split()[:3]
    other = new_key(tmp_path / "other").with_suffix(".pub").read_text().split()[1]
    known.write_text(f"# of the rack\n{name} {kind} {other}\n")
    with pytest.raises(NotAdmittedError, match="shows another host key") as caught:
        run(client, ("true",), LIMIT_S)
    assert f"line 2 of {known}" in str(caught.value)
    advice = re.findall(r"`(.*?)`", str(caught.value))
    assert advice == [shlex.join(["ssh-keygen", "-f", str(known), "-R", f"[{ADDRESS}]:{host.port}"])]
    subprocess.run(shlex.split(advice[0]), check=True, capture_output=True)
    assert run(client, ("echo", "again"), LIMIT_S) == "again\n"


# --- time and lost connections --------------------------------------------------------------------------------------


def sleeper(pid_file: Path) -> tuple[str, ...]:
    """A command that tells its pid and does not end by itself."""
    return ("sh", "-c", f"echo $$ >{shlex.quote(str(pid_file))}; exec sleep 100")


@contextmanager
def given(give: Callable[..., object], host: SshHost, pid_file: Path) -> Iterator[tuple["Future[object]", int]]:
    """A sleeper that runs there, and its pid; it is ended by its pid."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(give, host, sleeper(pid_file), PART_S)
        pid = told(pid_file)
        try:
            yield future, pid
        finally:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def clients() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if one.name() == "ssh"]


def test_the_time_limit_ends_the_command_here_and_there(
    host: SshHost, sessions: Callable[[], list[psutil.Process]], short: float, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(CutOffError, match=rf"`sh -c .*` did not end on {host} within {short:g} s\."):
        run(host, sleeper(tmp_path / "pid"), short)
    assert short <= time.monotonic() - began < short + 2
    assert not clients()
    assert eventually(lambda: not alive(told(tmp_path / "pid")) and not sessions())


def test_what_a_command_leaves_running_is_left_alone(host: SshHost, tmp_path: Path) -> None:
    """As a node that joins the rack: it must not end with the connection that started it."""
    start = f"sleep 100 >/dev/null 2>&1 & echo $! >{shlex.quote(str(tmp_path / 'pid'))}"
    began = time.monotonic()
    assert run(host, ("sh", "-c", start), LIMIT_S) == ""
    assert time.monotonic() - began < LIMIT_S, "not until the time limit"
    pid = told(tmp_path / "pid")
    time.sleep(0.2)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_connection_that_is_cut(host: SshHost, sessions: Callable[[], list[psutil.Process]], tmp_path: Path) -> None:
    with given(run, host, tmp_path / "pid") as (result, pid):
        for session in sessions():
            session.kill()
        with pytest.raises(CutOffError, match=rf"The connection to {host} was lost while `sh -c .*` ran there: .*clos"):
            result.result(SETTLE_S)
        assert eventually(lambda: not alive(pid))


def test_a_mac_that_closes_the_connection_has_parted(
    host: SshHost, sessions: Callable[[], list[psutil.Process]], tmp_path: Path
) -> None:
    """The command goes on without the connection."""
    with given(run_and_part, host, tmp_path / "pid") as (result, pid):
        for session in sessions():
            session.kill()
        assert result.result(SETTLE_S) is None
        time.sleep(0.2)
        assert alive(pid)


def test_a_mac_that_falls_silent_has_parted(
    host: SshHost, sessions: Callable[[], list[psutil.Process]], tmp_path: Path
) -> None:
    impatient = replace(host, options=(*host.options, "ServerAliveInterval=1", "ServerAliveCountMax=1"))
    with given(run_and_part, impatient, tmp_path / "pid") as (result, _):
        frozen = sessions()
        for session in frozen:
            session.suspend()
        assert result.result(SETTLE_S) is None
        for session in frozen:
            session.kill()


def test_a_mac_that_stays_awake_has_not_parted(
    host: SshHost, short: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ssh, "SILENCE_S", short / 2)
    with pytest.raises(CutOffError, match=rf"did not end on {host} within {short:g} s\."):
        run_and_part(host, sleeper(tmp_path / "pid"), short)
    os.kill(told(tmp_path / "pid"), signal.SIGKILL)


def test_parting_from_a_command_that_ends(host: SshHost) -> None:
    run_and_part(host, ("true",), PART_S)
    with pytest.raises(CommandError, match="exit status 1"):
        run_and_part(host, ("false",), PART_S)


def test_a_time_in_which_nobody_can_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"20 s are too short to notice .* more than 20 s"):
        run_and_part(nobody(), ("true",), ssh.SILENCE_S)
