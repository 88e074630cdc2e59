"""Commands on a Mac, given through the system's own ssh client: its keys, agent, configuration and known hosts apply.

    SshHost, words --command_line (pure)--> `ssh ... /bin/sh -c FRAME words` --_converse--> _Reply --_fault--> SshError

FRAME is a line of sh around the command. It prints one line before the command and one with its exit status after it,
which tells apart what ssh's exit status cannot, for that is 255 whatever happens to the connection:

    no first line         the command was never given: ssh's own words say why
    a first line alone    it was given, and the connection was lost, or time ran out, before it ended
    both                  it ended, with the status of the second

What a login shell prints of its own comes before the first line and is dropped. With a leash, FRAME also watches its
standard input, that is the connection, and ends the command when that is gone.
"""

import math
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pomarium.worker import local_network
from pomarium.worker.address import authority
from pomarium.worker.errors import PomariumError

PORT = 22
CONNECT_S = 10.0
"""For TCP and the key exchange together; a Mac that is awake takes milliseconds."""
ALIVE_INTERVAL_S = 5
ALIVE_COUNT = 3
SILENCE_S = float(ALIVE_INTERVAL_S * (ALIVE_COUNT + 1))
"""After so long without a sign of life ssh gives the connection up, at the latest."""
BANNER_S = 3.0
"""For one look whether sshd answers."""
MAX_GREETING = 8 << 10
"""Bytes; a server may say something before its version (RFC 4253, section 4.2)."""

_BEGUN = "pomarium:begun\n"
_ENDED = re.compile(_BEGUN + r"(.*)\npomarium:ended (\d+)\n", re.DOTALL)
# sshd gives each command a process group of its own (do_exec_no_pty), which `kill 0` reaches, the watcher included.
_LEASH = "exec 3<&0; { read -r nothing; kill 0; } <&3 >/dev/null 2>&1 & watcher=$!; "
_UNLEASH = '{ kill "$watcher"; wait "$watcher"; } 2>/dev/null; '
_FRAME = (
    r'printf "pomarium:begun\n"; printf "pomarium:begun\n" >&2; '
    r'%s"$@" </dev/null 3<&-; status=$?; %s'
    r'printf "\npomarium:ended %%d\n" "$status"; exit "$status"'
)

_CHANGED = "REMOTE HOST IDENTIFICATION HAS CHANGED"
_OFFENDING = re.compile(r"^Offending .*?key .*?in (.+):(\d+)\s*$", re.MULTILINE)
_DENIED = re.compile(r"Permission denied \(|Too many authentication failures")
_SILENT = re.compile(
    r"connect to host|Could not resolve hostname|timed out|Connection (?:closed|reset) by|exchange_identification"
)
_LINE_LENGTH = 80


class SshError(PomariumError):
    """A command could not be given to a Mac, or did not succeed there."""


class NoAnswerError(SshError):
    """The Mac does not answer ssh (yet)."""


class NotAdmittedError(SshError):
    """The Mac, or this machine, does not trust the other's key: waiting does not help, a person has to look."""


class CutOffError(SshError):
    """The command was given, and it is not known how it ended: the connection was lost, or time ran out."""


class CommandError(SshError):
    """The command ended with an exit status other than 0: `status`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class SshHost:
    """Where and as whom to log in.

    Attributes:
        user: None for whom ssh's configuration says. address: IP address or host name.
        options: `-o` options such as "UserKnownHostsFile=/a/file"; they go before ours.
        identity: file of the private key, then the only one that is tried; None for those that ssh finds itself.
    """

    user: str | None
    address: str
    port: int = PORT
    options: tuple[str, ...] = ()
    identity: Path | None = None

    def __str__(self) -> str:
        return self.login if self.port == PORT else f"{self.login} port {self.port}"

    @property
    def login(self) -> str:
        """USER@ADDRESS."""
        return self.address if self.user is None else f"{self.user}@{self.address}"


@dataclass(frozen=True)
class _Reply:
    """What came back.

    Attributes:
        client: exit status of ssh; None if time ran out.
        begun: whether the command was given. status: its exit status; None if it is not known to have ended.
        output: its standard output; "" unless it ended.
        said: what was written to standard error: once it has begun by it, before by ssh.
    """

    client: int | None
    begun: bool
    status: int | None
    output: str
    said: str


def command_line(host: SshHost, remote: Sequence[str], connect_timeout_s: float) -> list[str]:
    """What runs the words of `remote` there, each arriving as it is, through a login shell that quotes as POSIX's does.

    It never asks for anything, takes the key of a host seen for the first time and refuses one that has changed. The
    connection is its own: a shared one (ControlMaster) would be a dead one after the Mac has slept.
    """
    ours = (
        "BatchMode=yes",
        f"ConnectTimeout={max(math.ceil(connect_timeout_s), 1)}",
        "StrictHostKeyChecking=accept-new",
        f"ServerAliveInterval={ALIVE_INTERVAL_S}",
        f"ServerAliveCountMax={ALIVE_COUNT}",
        "ControlMaster=no",
        "ControlPath=none",
        "ClearAllForwardings=yes",
        "RemoteCommand=none",
        "LogLevel=INFO",  # a quieter one would leave out why it failed
    )
    # ssh takes the first value that it is given of an option.
    options = [word for option in (*host.options, *ours) for word in ("-o", option)]
    identity = [] if host.identity is None else ["-i", str(host.identity), "-o", "IdentitiesOnly=yes"]
    user = [] if host.user is None else ["-l", host.user]
    return ["ssh", "-T", *options, *identity, "-p", str(host.port), *user, "--", host.address, shlex.join(remote)]


def run(host: SshHost, remote: Sequence[str], timeout_s: float) -> str:
    """Run a command there, without standard input. Returns its standard output, what is not UTF-8 replaced.

    When time runs out or this process ends, the command gets SIGTERM, with all that is in its process group; what it
    has put into a session of its own goes on. While something that it left running holds its output, this waits.

    Raises:
        NoAnswerError: there is nobody, or not within `timeout_s`. NotAdmittedError: keys do not fit.
        CommandError: it failed. CutOffError: it did not end. SshError: there is no ssh client here, or another reason.
    """
    reply = _give(host, remote, timeout_s, leashed=True)
    if reply.status != 0:
        raise _fault(host, remote, reply, timeout_s)
    return reply.output


def run_and_part(host: SshHost, remote: Sequence[str], timeout_s: float) -> None:
    """Give a command that may take the connection with it, such as `pmset sleepnow`.

    A connection that is lost after the command was begun is a success, for the command goes on without it. A Mac that
    falls asleep without closing it is noticed after SILENCE_S, so `timeout_s` must be more than that; if it is reached,
    the Mac is awake still. A Mac that loses power in the instant before the first line gets through counts as silent.

    Raises:
        NoAnswerError: it was not given. CutOffError: it was, and has not ended. Others: as `run` does.
        ValueError: `timeout_s` is too short to tell.
    """
    if timeout_s <= SILENCE_S:
        raise ValueError(f"{timeout_s:g} s are too short to notice that a Mac is gone: more than {SILENCE_S:g} s")
    reply = _give(host, remote, timeout_s, leashed=False)
    parted = reply.begun and reply.status is None and reply.client is not None
    if reply.status != 0 and not parted:
        raise _fault(host, remote, reply, timeout_s)


def answers(host: SshHost, timeout_s: float) -> bool:
    """Whether an SSH server says its version there: a Mac that wakes takes connections before that.

    Asks the address itself, whatever ssh's configuration says of it. A host name may take its look-up's time longer.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host.address, host.port), timeout_s) as connection:
            return _greets(connection, deadline)
    except OSError:
        return False  # refused, no route, timed out, unknown name, reset


def await_ssh(
    host: SshHost,
    deadline_s: float,
    pause_s: float = 1.0,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the Mac answers ssh. Raises NoAnswerError if it does not within `deadline_s` from now.

    pause_s: seconds between two looks. sleep, clock: in seconds.
    """
    deadline = clock() + deadline_s
    while not answers(host, min(BANNER_S, max(deadline - clock(), 0.1))):
        left = deadline - clock()
        if left <= 0:
            raise _no_answer(host, f"not within {deadline_s:g} s")
        sleep(min(pause_s, left))


def _greets(connection: socket.socket, deadline: float) -> bool:
    said = b""
    while len(said) < MAX_GREETING:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        connection.settimeout(left)
        piece = connection.recv(MAX_GREETING)
        if not piece:
            return False
        said += piece
        if any(line.startswith(b"SSH-") and line.endswith(b"\n") for line in said.splitlines(keepends=True)):
            return True
    return False


def _give(host: SshHost, remote: Sequence[str], timeout_s: float, *, leashed: bool) -> _Reply:
    """leashed: whether the command ends with the connection."""
    frame = _FRAME % ((_LEASH, _UNLEASH) if leashed else ("", ""))
    command = command_line(host, ("/bin/sh", "-c", frame, "sh", *remote), min(timeout_s, CONNECT_S))
    return _read(*_converse(command, timeout_s, subprocess.PIPE if leashed else subprocess.DEVNULL))


def _converse(command: Sequence[str], timeout_s: float, stdin: int) -> tuple[int | None, str, str]:
    """Exit status, None if time ran out, standard output and error. stdin: a pipe stays open while the client runs.

    Output goes to files: a pipe could be held open by what the client has started, and reading it would hang.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as said:
        with _start(command, stdin, output, said) as client:
            try:
                status = client.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(client)
        return status, _text(output), _text(said)


def _start(command: Sequence[str], stdin: int, output: IO[bytes], said: IO[bytes]) -> "subprocess.Popen[bytes]":
    """In a session of its own: without a terminal to ask at, and with all that it starts in one process group."""
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=output, stderr=said, start_new_session=True)
    except FileNotFoundError:
        raise SshError("There is no ssh client here: install OpenSSH's, so that `ssh` is on PATH.") from None


def _end(client: "subprocess.Popen[bytes]") -> None:
    if client.poll() is None:
        os.killpg(client.pid, signal.SIGKILL)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _read(client: int | None, output: str, said: str) -> _Reply:
    ended = _ENDED.search(output)
    return _Reply(
        client,
        begun=_BEGUN in output,
        status=None if ended is None else int(ended[2]),
        output="" if ended is None else ended[1],
        said=said.rpartition(_BEGUN)[2],
    )


def _fault(host: SshHost, remote: Sequence[str], reply: _Reply, timeout_s: float) -> SshError:
    if not reply.begun:
        return _not_begun(host, reply, timeout_s)
    command = textwrap.shorten(shlex.join(remote), _LINE_LENGTH, placeholder=" ...")
    if reply.status is not None:
        why = _last_line(reply.said) or _last_line(reply.output) or "it says nothing"
        return CommandError(f"`{command}` failed on {host} with exit status {reply.status}: {why}.", reply.status)
    if reply.client is None:
        return CutOffError(f"`{command}` did not end on {host} within {timeout_s:g} s.")
    why = _last_line(reply.said) or f"ssh ended with status {reply.client}"
    return CutOffError(f"The connection to {host} was lost while `{command}` ran there: {why}.")


def _not_begun(host: SshHost, reply: _Reply, timeout_s: float) -> SshError:
    if _CHANGED in reply.said:
        return _changed(host, reply.said)
    if _DENIED.search(reply.said):
        return _denied(host)
    if reply.client is None:
        return _no_answer(host, f"not within {timeout_s:g} s")
    why = _last_line(reply.said) or f"ssh ended with status {reply.client}"
    if _SILENT.search(reply.said):
        return _no_answer(host, local_network.explained(why, authority(host.address, host.port)))
    return SshError(f"No command could be given to {host}: {why}.")


def _no_answer(host: SshHost, why: str) -> NoAnswerError:
    return NoAnswerError(
        f"{host} does not answer ssh ({why}): look whether it is awake, and whether Remote Login is on in its Sharing "
        "settings."
    )


def _denied(host: SshHost) -> NotAdmittedError:
    key = "a key of this user" if host.identity is None else f"the key {host.identity}"
    identity = [] if host.identity is None else ["-i", str(host.identity)]
    port = [] if host.port == PORT else ["-p", str(host.port)]
    copy = shlex.join(["ssh-copy-id", *identity, *port, host.login])
    return NotAdmittedError(
        f"{host} does not accept {key}: add its public half to ~/.ssh/authorized_keys there, with `{copy}`."
    )


def _changed(host: SshHost, said: str) -> NotAdmittedError:
    """ssh keeps a host on another port than 22 under [ADDRESS]:PORT, in one of several files."""
    known_as = host.address if host.port == PORT else f"[{host.address}]:{host.port}"
    offending = _OFFENDING.search(said)
    file = [] if offending is None else ["-f", offending[1]]
    line = "" if offending is None else f", line {offending[2]} of {offending[1]}"
    forget = shlex.join(["ssh-keygen", *file, "-R", known_as])
    return NotAdmittedError(
        f"{host} shows another host key than the one that is known here{line}: if it was set up anew, forget the old "
        f"one with `{forget}`; if not, find out who answers at this address."
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
