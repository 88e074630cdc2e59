"""An HTTP server on a socket that listens already, in the event loop of whoever starts it: uvicorn's.

connections --timed_protocol.py: heads in time--> RequestLog --> Door: bodies in time and size --> the application
                                                            `--> before it, where other origins are let in: CORS
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from pomarium.cluster.http.asgi import App
from pomarium.cluster.http.door import Bounds, Door
from pomarium.cluster.http.request_log import RequestLog
from pomarium.cluster.http.timed_protocol import TimedProtocol

METHODS = ("GET", "POST", "DELETE")

KEEP_ALIVE_S = 90
"""For which an idle connection is kept: longer than clients' pools keep theirs, most of them for less than a minute."""


class HttpServer:
    """The server. `listener`: bound, listening; it is closed with the server. `count`: see RequestLog. `origins`: of
    pages whose browsers may let them use it; * for all."""

    def __init__(
        self,
        app: App,
        listener: socket.socket,
        bounds: Bounds,
        count: Callable[[str, str, int], None],
        origins: Sequence[str] = (),
    ) -> None:
        behind: App = Door(app, bounds)
        if origins:
            behind = CORSMiddleware(
                behind,
                allow_origins=origins,
                allow_methods=METHODS,
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        protocol = type("Protocol", (TimedProtocol,), {"head_timeout": bounds.timeout})
        config = uvicorn.Config(
            RequestLog(behind, count),
            http=protocol,
            ws="none",
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            proxy_headers=False,
            access_log=False,
            log_config=None,
        )
        # What fails in a request is logged where it fails; of a client that speaks no HTTP there is nothing to say.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take connections from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)
        self.check()

    def check(self) -> None:
        """Raises RuntimeError if it takes no connections."""
        if self._serving is None or self._serving.done():
            raise RuntimeError("the HTTP server has ended")

    async def drain(self) -> None:
        """Take no more connections; return when all that runs is answered."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
