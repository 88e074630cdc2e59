"""A server as strangers and batches meet it: a tiny model, a key, bounds that are soon reached.

Its environment names a proxy that answers nothing, and its model's folder has a name that is a pattern of names.
"""

import contextlib
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from recording_proxy import Proxy
from serve_process import CONTEXT, Server
from tiny_models import write_checkpoint

KEY, HF_TOKEN = f"sk-{secrets.token_hex(8)}", f"hf_{secrets.token_hex(8)}"
TIMEOUT_S = 4.0
BODY_BYTES, UPLOAD_BYTES = 8 << 20, 1 << 20
AUTHORISED = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Guarded(Server):
    """The server.

    Attributes:
        asked: what its processes, Ray's own included, have asked the proxy for.
        shown: command lines with a secret that somebody could have read while it started.
    """

    asked: list[bytes] = field(default_factory=list)
    shown: set[str] = field(default_factory=set)

    @classmethod
    @contextmanager
    def made(cls, folder: Path) -> Iterator["Guarded"]:
        """The server, not started; it ends with the context."""
        tiny = write_checkpoint("llama", folder / "[tiny] *?", max_position_embeddings=CONTEXT)
        proxy = Proxy()
        variables = {
            "POMARIUM_API_KEY": KEY,
            "HF_TOKEN": HF_TOKEN,
            "POMARIUM_CLIENT_TIMEOUT": str(TIMEOUT_S),
            "POMARIUM_MAX_BODY": str(BODY_BYTES),
            "POMARIUM_MAX_UPLOAD": "1MiB",
            **proxy.environment,
        }
        arguments = [str(tiny), "--served-name", "tiny", "--max-num-seqs", "8"]
        server = cls(folder, arguments, variables, KEY, asked=proxy.asked)
        with contextlib.closing(proxy):
            try:
                yield server
            finally:
                server.end()
        assert [asked for asked in server.asked if b"127.0.0.1" in asked] == [], "Ray's own processes included"

    def ensure(self, *models: str) -> None:
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.1):
                self.shown |= _lines_with_a_secret()

        thread = threading.Thread(target=look)
        thread.start()
        try:
            super().ensure(*models)
        finally:
            over.set()
            thread.join()


def _lines_with_a_secret() -> set[str]:
    lines = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace")
            if KEY in line or HF_TOKEN in line:
                lines.add(line)
    return lines
