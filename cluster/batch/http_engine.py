"""A running OpenAI endpoint as the engine of a batch job: `pomarium serve`'s, whose replicas the job then uses.

Request --POST url/v1/...--> Answer          no connection, 502 to 504: again, with pauses, for OUTAGE_S
                                             429: again after Retry-After, for as long as it takes

Requests say that people go first (endpoint/clients.py); another endpoint does not mind.
"""

import asyncio
import math
import time

import httpx

from pomarium.cluster.batch.lines import Answer, Request, answer_of
from pomarium.cluster.http.protocols import BATCH, PRIORITY
from pomarium.worker.address import is_local
from pomarium.worker.errors import PomariumError

ROOM = 64
OUTAGE_S = 900.0
"""An endpoint that starts a lost engine anew is back within minutes."""
PAUSES_S = (0.5, 30.0)
"""First and longest pause between two attempts."""
ANSWER_S = 3600.0
AWAY = frozenset({502, 503, 504})
BUSY = 429
LONGEST_BUSY_S = 120.0
"""Of a Retry-After that is followed: somebody else's endpoint may say hours."""


class EndpointError(PomariumError):
    """The endpoint does not answer; says what was seen."""


class HttpEngine:
    """A dispatch.Engine at a URL."""

    def __init__(
        self,
        url: str,
        key: str | None,
        room: int = ROOM,
        start_s: float = 0.0,
        outage_s: float = OUTAGE_S,
        own: bool = False,
    ) -> None:
        """`url`: with or without /v1 at its end. `key`: a bearer token.

        start_s, outage_s: how long it may be away at the start, and later.
        own: it is Pomarium's. A proxy of the environment is then never asked for it, nor for one in the local network.

        Raises EndpointError if `url` is none.
        """
        self.room, self._start_s, self._outage_s = room, start_s, outage_s
        self._url = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=room, max_keepalive_connections=room)
        straight = own or is_local(_host(self._url))
        self._client = httpx.AsyncClient(
            # With a transport of its own it looks at no proxy's variable, and still at those of certificates.
            transport=httpx.AsyncHTTPTransport(limits=limits) if straight else None,
            headers={PRIORITY: BATCH} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(ANSWER_S, connect=10.0),
            limits=limits,
        )

    async def start(self) -> None:
        """See dispatch.Engine. Raises EndpointError if nothing that serves models answers."""
        deadline = time.monotonic() + self._start_s
        while (fault := await self._fault()) is not None:
            if time.monotonic() >= deadline:
                raise EndpointError(fault)
            await asyncio.sleep(PAUSES_S[0])

    async def _fault(self) -> str | None:
        """Why it cannot be asked; None if it can."""
        try:
            response = await self._client.get(f"{self._url}/v1/models", timeout=10.0)
        except httpx.HTTPError as error:
            return f"No endpoint answers at {self._url} ({type(error).__name__}: {error})."
        if response.status_code != httpx.codes.OK:
            return f"{self._url}/v1/models answers {response.status_code}: {response.text[:200]}"
        return None

    async def answer(self, request: Request) -> Answer:
        """See dispatch.Engine.

        Raises:
            EndpointError: it gave no answer for too long; what is not answered can be asked with --resume.
        """
        deadline, pause = time.monotonic() + self._outage_s, PAUSES_S[0]
        while True:
            try:
                response = await self._client.post(
                    f"{self._url}{request.url}", content=request.body, headers={"Content-Type": "application/json"}
                )
                if response.status_code == BUSY:  # it is there
                    deadline = time.monotonic() + self._outage_s
                    await asyncio.sleep(busy_s(response.headers.get("retry-after"), pause))
                    pause = min(2 * pause, PAUSES_S[1])
                    continue
                if response.status_code not in AWAY:
                    return answer_of(response.status_code, response.content)
                seen = f"{response.status_code} {response.text[:200]}"
            except httpx.TransportError as error:
                seen = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise EndpointError(f"{self._url} was away for {self._outage_s:g} s ({seen}): go on with --resume.")
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])

    async def close(self) -> None:
        """Give back connections."""
        await self._client.aclose()


def busy_s(retry_after: str | None, otherwise: float) -> float:
    """Seconds until a busy endpoint is asked again. retry_after: the header, seconds (RFC 9110 has dates as well, for
    which, as for none, it is `otherwise`)."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return otherwise
    return min(max(seconds, 0.0), LONGEST_BUSY_S) if math.isfinite(seconds) else otherwise


def _host(url: str) -> str:
    """Raises EndpointError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise EndpointError(
            f"{url!r} is no URL ({error}): write http://HOST:PORT, an IPv6 address in brackets."
        ) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EndpointError(f"{url!r} is no URL of an endpoint: write http://HOST:PORT.")
    return parsed.host
