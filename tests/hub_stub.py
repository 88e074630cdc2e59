"""A Hub on this machine: the answers of Hugging Face's that a snapshot download asks for, with one model in it.

folder --serving--> Hub at http://127.0.0.1:PORT, whose only model is `tiny/model`
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "tiny/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Attributes:
    folder: the model's. url: of the Hub.
    requests: paths that were asked for. sent: files whose content was.
    sizes: of files that are told to be of another size than they are.
    stalls_at: bytes of a file after which its answer stands still; None: it goes on. stalled: one does.
    """

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    stalls_at: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A Hub whose model is `folder`, until the context is left."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        hub = self.hub
        hub.requests.append(self.path)
        path = self.path.partition("?")[0]
        files = sorted(p.name for p in hub.folder.iterdir())
        sizes = {name: (hub.folder / name).stat().st_size for name in files} | hub.sizes
        headers = {"X-Repo-Commit": COMMIT}
        name, length = path.rsplit("/", 1)[1], None
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            listing = [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in files]
            content, status = json.dumps(listing).encode(), 200
        elif path.startswith(f"/api/models/{MODEL}"):
            info = {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": n, "size": sizes[n]} for n in files]}
            content, status = json.dumps(info).encode(), 200
        elif path.startswith(f"/{MODEL}/resolve/") and name in files:
            content, status = (hub.folder / name).read_bytes(), 200
            headers |= {"ETag": f'"{name}"'}
            length = sizes[name] if not body else None
            if body:
                hub.sent.append(name)
        else:
            content, status = b"{}", 404
            headers |= {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if hub.stalls_at is not None and len(content) > hub.stalls_at and "/resolve/" in path:
            self.wfile.write(content[: hub.stalls_at])
            self.wfile.flush()
            hub.stalled.set()
            hub.go_on.wait()
            return
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        del arguments
