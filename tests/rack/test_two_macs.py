"""docs/distributed.md's own lines, typed on two Macs that are network namespaces with a cable between them, and
README's on three: each with its own address, host name and rack key, and nothing else in common but the disk.
"""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import doc_lines
import pytest
from doc_lines import ROOT, Line
from namespaces import ip, namespace_or_skip
from rack_serving import until
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

DISTRIBUTED, README = "docs/distributed.md", "README.md"
READY_S, DONE_S = 400.0, 200.0
ADDRESSES = ("10.0.5.1", "10.0.5.2", "10.0.5.3")
"""Of the page's Thunderbolt bridge."""
KEY = re.compile(r"--key (\S+)")


def shown(terminal: int) -> bytes:
    """What a program has written to its terminal since the last look."""
    try:
        return os.read(terminal, 4096)
    except BlockingIOError:
        return b""


@dataclass
class Mac:
    """A machine, and who sits at it. folder: a clone. mapped: what the page leaves to its reader."""

    number: int
    namespace: str
    folder: Path
    state: Path
    mapped: dict[str, str]

    def command(self, text: str) -> list[str]:
        """`text` in this machine's network and under its own host name."""
        named = f"hostname mac-{self.number} && exec bash -c {shlex.quote(text)}"
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named]

    @property
    def environ(self) -> dict[str, str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "POMARIUM_", "VLLM_"))}
        return kept | {
            "XDG_STATE_HOME": str(self.state),
            "XDG_CONFIG_HOME": str(self.state),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }

    def typed(self, line: Line) -> str:
        text = line.text
        for placeholder, own in self.mapped.items():
            text = text.replace(placeholder, own)
        return text

    def run(self, line: Line, answer: str | None = None) -> str:
        """What the line prints at a terminal; `answer` is typed there. Fails unless it ends well."""
        here, there = pty.openpty()
        os.set_blocking(here, False)
        output = self.state / "output"
        try:
            with output.open("wb") as file:
                process = subprocess.Popen(
                    self.command(self.typed(line)), cwd=self.folder, env=self.environ,
                    stdin=there, stdout=file, stderr=file, start_new_session=True,
                )  # fmt: skip
            if answer is not None:
                # Only then: the prompt throws away what was typed before it.
                until(lambda: process.poll() is not None or b"Key of" in shown(here), DONE_S, output.read_text)
                os.write(here, f"{answer}\n".encode())
            assert process.wait(DONE_S) == 0, output.read_text()
        finally:
            os.close(here)
            os.close(there)
        return output.read_text()

    def ask(self, path: str) -> str:
        """What the endpoint answers to somebody at this Mac."""
        done = subprocess.run(
            self.command(f"curl -s --fail-with-body {path}"), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def block(page: str, beginning: str) -> list[Line]:
    """The lines of the page's sh block that holds one that begins so."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [list(doc_lines.lines(page, part)) for part in re.findall(r"^```sh\n.*?^```", text, re.M | re.S)]
    (found,) = (lines for lines in blocks if any(line.text.startswith(beginning) for line in lines))
    return found


@pytest.fixture(scope="module")
def macs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Mac]]:
    """Three, joined by a switch of their own, which is a namespace with a bridge in it."""
    model = tmp_path_factory.mktemp("models") / "llama"
    write_checkpoint("llama", model, max_position_embeddings=512)
    with ExitStack() as stack:
        switch = stack.enter_context(namespace_or_skip("pmsw"))
        ip("-netns", switch, "link", "add", "bridge0", "type", "bridge")
        ip("-netns", switch, "link", "set", "bridge0", "up")
        found = []
        for number, address in enumerate(ADDRESSES, 1):
            name = stack.enter_context(namespace_or_skip("pmmac"))
            ip("-netns", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-netns", switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            ip("-netns", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-netns", name, "link", "set", "eth0", "up")
            ip("-netns", name, "link", "set", "lo", "up")
            folder = tmp_path_factory.mktemp(f"clone{number}")
            (folder / ".venv").symlink_to(ROOT / ".venv")
            # A Unix socket's path is short.
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"pmm{number}", dir="/tmp")))
            found.append(Mac(number, name, folder, state, {"MODEL": str(model)}))
        try:
            yield found
        finally:
            for mac in found:
                down = mac.command(".venv/bin/pomarium rack down")
                subprocess.run(down, cwd=mac.folder, env=mac.environ, capture_output=True, timeout=DONE_S, check=False)


def serve(mac: Mac, line: Line, name: str, then: list[tuple[Mac, Line]], macs: int) -> None:
    """Serve as the line says, ask from the same Mac, look at the rack as `then` says, and end it with Ctrl-C."""
    output = mac.state / "served"
    with output.open("wb") as file:
        process = subprocess.Popen(
            mac.command(f"exec {mac.typed(line)}"), cwd=mac.folder, env=mac.environ, stdin=subprocess.DEVNULL,
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or "ready" in output.read_text(), READY_S, output.read_text)
        assert process.poll() is None, output.read_text()
        body = json.dumps({"model": name, "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
        url = "http://127.0.0.1:8000/v1/completions"
        answer = json.loads(mac.ask(f"{url} -H 'Content-Type: application/json' -d {shlex.quote(body)}"))
        assert answer["usage"]["completion_tokens"] == 4
        for who, look in then:
            said = who.run(look)
            assert f"{macs} of {macs} Macs alive" in said
            assert all(f"mac-{number}" in said for number in range(1, macs + 1))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def test_two_macs_in_at_most_six_commands(macs: list[Mac]) -> None:
    one, two, _ = macs
    install, up, join, run, status = block(DISTRIBUTED, ".venv/bin/pomarium rack join")
    on_both = 2
    assert install.text.endswith("make install")
    assert on_both + len([up, join, run, status]) <= 6
    said = one.run(up)
    key = KEY.search(said)
    assert key is not None, said
    assert "joined the rack at 10.0.5.1:6379" in two.run(join, answer=key[1])
    serve(one, run, "llama", [(one, status), (two, status)], macs=2)


@pytest.mark.full
def test_three_macs_in_at_most_ten_commands(macs: list[Mac]) -> None:
    """On the rack of the test before, which the third Mac joins, and the first two have joined already."""
    install, up, join, run, status, _ = block(README, ".venv/bin/pomarium rack join")
    on_each, on_others = [install] * 3, [join] * 2
    assert len([*on_each, up, *on_others, run, status]) <= 10
    key = (macs[0].state / "pomarium/rack.key").read_text().strip()
    macs[2].mapped["HEAD"] = ADDRESSES[0]
    assert "joined the rack at 10.0.5.1:6379" in macs[2].run(join, answer=key)
    serve(macs[0], run, "smollm2", [(macs[0], status)], macs=3)
