"""Commands over ssh: to a real sshd on loopback, to what only looks like one, and through the shells that Macs have."""

import contextlib
import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from pomarium.cluster.autoscaling import sleep, ssh, transport
from pomarium.cluster.autoscaling.ssh import (
    CommandError,
    CutOffError,
    NoAnswerError,
    NotAdmittedError,
    SshError,
    SshHost,
    answers,
    await_ssh,
    command_line,
    run,
    run_and_part,
)
from pomarium.cluster.autoscaling.wake_on_lan import Target, magic_packet
from pomarium.cluster.node import ports

ADDRESS = "127.0.0.1"
LIMIT_S = 20.0
PART_S = ssh.SILENCE_S + 20
SHORT_S = 1.0
SETTLE_S = 20.0

pytestmark = pytest.mark.e2e


# --- a server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """An sshd of our own. `host`: how a client with the right key reaches it."""

    command: tuple[str, ...]
    folder: Path
    host: SshHost


@pytest.fixture(scope="module")
def sshd() -> str:
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is not None:
        return found
    if os.environ.get("CI"):
        pytest.fail("no sshd: install openssh-server")
    pytest.skip("no sshd here: install openssh-server")


def new_key(file: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", file.name, "-f", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file


def configure(sshd: str, folder: Path) -> Server:
    """Keys and the configuration of an sshd that has not been started."""
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
    return Server((sshd, "-D", "-e", "-f", str(folder / "sshd_config")), folder, host)


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


@pytest.fixture(scope="module")
def server(sshd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """A server and its pid."""
    made = configure(sshd, tmp_path_factory.mktemp("sshd"))
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


def eventually(holds: Callable[[], object]) -> bool:
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


# --- nobody there ---------------------------------------------------------------------------------------------------


@contextmanager
def listener(serve: Callable[[socket.socket], object] | None = None) -> Iterator[SshHost]:
    """Takes connections, and does that with each, then closes it; nothing at all, and leaves it open, without."""
    with socket.create_server((ADDRESS, 0)) as made:
        if serve is not None:
            threading.Thread(target=_serve, args=(made, serve), daemon=True).start()
        try:
            yield SshHost("rack", ADDRESS, made.getsockname()[1], ("UserKnownHostsFile=/dev/null",))
        finally:
            made.shutdown(socket.SHUT_RDWR)


def _serve(made: socket.socket, serve: Callable[[socket.socket], object]) -> None:
    while True:
        try:
            connection, _ = made.accept()
        except OSError:
            return  # shut down
        with connection, contextlib.suppress(OSError):  # the other has seen enough
            serve(connection)


def say(*pieces: bytes) -> Callable[[socket.socket], object]:
    def serve(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)

    return serve


def nobody() -> SshHost:
    return SshHost("rack", ADDRESS, ports.free(1)[0])


@pytest.mark.parametrize("give", [run, run_and_part])
def test_nothing_listens(give: Callable[..., object]) -> None:
    absent = nobody()
    assert not answers(absent, SHORT_S)
    with pytest.raises(NoAnswerError) as caught:
        give(absent, ("true",), PART_S)
    assert str(caught.value) == (
        f"rack@{ADDRESS} port {absent.port} does not answer ssh (ssh: connect to host {ADDRESS} port {absent.port}: "
        "Connection refused): look whether it is awake, and whether Remote Login is on in its Sharing settings."
    )


def test_a_listener_that_says_nothing() -> None:
    with listener() as silent:
        began = time.monotonic()
        assert not answers(silent, 0.2)
        with pytest.raises(NoAnswerError, match="does not answer ssh"):
            run(silent, ("true",), SHORT_S)
        assert time.monotonic() - began < SHORT_S + 2


@pytest.mark.parametrize("give", [run, run_and_part])
def test_a_connection_that_is_closed_before_the_command_was_given(give: Callable[..., object]) -> None:
    with listener(say()) as closing, pytest.raises(NoAnswerError, match=r"Connection (closed|reset) by"):
        give(closing, ("true",), PART_S)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((b"SSH-2.0-x\r\n",), True),
        ((b"S", b"SH-2.0", b"-x\n"), True),
        ((b"This rack is ours.\r\nSSH", b"-2.0-x\r\n"), True),
        ((b"SSH-2.0-x",), False),
        ((b"HTTP/1.1 400 Bad Request\r\nX: SSH-2.0\r\n",), False),
        ((b"x" * (ssh.MAX_GREETING + 1), b"\nSSH-2.0-x\r\n"), False),
    ],
)
def test_only_a_whole_version_line_is_an_answer(pieces: tuple[bytes, ...], expected: bool) -> None:
    with listener(say(*pieces)) as found:
        assert answers(found, SHORT_S) is expected


def test_a_name_that_nobody_knows_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names are not looked up here: ssh's words are given to it, and the look-up fails."""

    def fail(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    stand_in(monkeypatch, tmp_path, "echo 'ssh: Could not resolve hostname mini-9: Unknown name' >&2; exit 255")
    assert not answers(SshHost("rack", "mini-9"), SHORT_S)
    with pytest.raises(NoAnswerError, match=r"rack@mini-9 does not answer ssh \(.*hostname mini-9: Unknown name\)"):
        run(SshHost("rack", "mini-9"), ("true",), LIMIT_S)


def test_there_is_no_ssh_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SshError, match=r"^There is no ssh client here: install OpenSSH's"):
        run(nobody(), ("true",), LIMIT_S)


# --- time and lost connections --------------------------------------------------------------------------------------


def sleeper(pid_file: Path) -> tuple[str, ...]:
    """A command that tells its pid and does not end by itself."""
    return ("sh", "-c", f"echo $$ >{shlex.quote(str(pid_file))}; exec sleep 100")


def told(pid_file: Path) -> int:
    assert eventually(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    return int(pid_file.read_text())


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


# --- waiting --------------------------------------------------------------------------------------------------------


def test_a_server_that_starts_later_is_awaited(sshd: str, tmp_path: Path) -> None:
    later = configure(sshd, tmp_path)
    with running(("sh", "-c", f"sleep 1; exec {shlex.join(later.command)}"), tmp_path / "log"):
        began = time.monotonic()
        await_ssh(later.host, LIMIT_S, 0.1)
        assert time.monotonic() - began > 0.9
        assert run(later.host, ("echo", "up"), LIMIT_S) == "up\n"


def test_waiting_ends_at_the_deadline() -> None:
    now, pauses = [100.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    with pytest.raises(NoAnswerError, match=r"does not answer ssh \(not within 5 s\)"):
        await_ssh(nobody(), 5.0, 2.0, sleep, lambda: now[0])
    assert pauses == [2.0, 2.0, 1.0]


# --- without a server -----------------------------------------------------------------------------------------------


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


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """In the place of the ssh client."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


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


# --- a Mac without an agent ------------------------------------------------------------------------------------------


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
    sshd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter hears the packet, its sshd starts; `pomarium` and `pmset` there write down what they are told."""
    made, told = configure(sshd, tmp_path), tmp_path / "told"
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


def test_a_mac_that_is_not_let_sleep_joins_again_and_says_why(
    sshd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS's own do: sudo on standard error, pmset on standard output."""
    made, told = configure(sshd, tmp_path), tmp_path / "told"
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


def test_a_wake_that_is_not_wanted_any_more_ends(sshd: str, tmp_path: Path) -> None:
    way = transport.Ssh(Target("02:00:00:00:00:01", ADDRESS), 9, configure(sshd, tmp_path).host, "pomarium", "h:1")
    began = time.monotonic()
    way.wake(lambda: False)
    assert time.monotonic() - began < SETTLE_S
