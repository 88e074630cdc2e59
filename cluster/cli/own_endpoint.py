"""An endpoint for as long as somebody talks with it: `pomarium serve` in a process of its own, on a port of its own.

    started(model) --> pomarium serve [MODEL] --port N, what it says on our stderr --GET /health is 200--> its URL
           `-- left, by SIGTERM and SIGHUP too --SIGTERM--> it ends

In a session of its own, so that a Ctrl-C that ends an answer does not reach it.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import httpx

from pomarium.cluster.node import ports
from pomarium.worker.errors import PomariumError

HOST = "127.0.0.1"
LOOK_S, LOOK_TAKES_S = 0.2, 5.0
END_S = 120.0
"""What `pomarium serve` may take to end by itself."""


class OwnEndpointError(PomariumError):
    """It did not start."""


@contextmanager
def started(model: str | None, environ: Mapping[str, str]) -> Iterator[str]:
    """Its URL, once it answers.

    Args:
        model: as `pomarium serve` takes it; None: the embedded one. environ: of its process.

    Raises:
        OwnEndpointError: it ended before it was ready, and has said why.
    """
    (port,) = ports.free(1)
    url = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "pomarium.cluster.cli.main", "serve", *([model] if model else [])]
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    serving = subprocess.Popen(
        [*command, "--host", HOST, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env=dict(environ),
        start_new_session=True,
    )
    try:
        _wait(serving, url)
        yield url
    finally:
        serving.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
        serving.wait(END_S)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _wait(serving: "subprocess.Popen[bytes]", url: str) -> None:
    with httpx.Client(trust_env=False, timeout=LOOK_TAKES_S) as client:
        while not _healthy(client, url):
            if serving.poll() is not None:
                raise OwnEndpointError("No endpoint was started for this chat: what it said is above.")
            time.sleep(LOOK_S)


def _healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
