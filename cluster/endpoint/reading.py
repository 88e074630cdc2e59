"""What the ingress reads of a request's body; the rest of it passes unread.

    path, body --Reader.read--> Asking: the model, what a replica is chosen by, what a queue is to know

A large body is read beside the loop that streams use, as far as Python's lock lets it.
"""

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pomarium.cluster.endpoint.routing import prefix_keys, text_of
from pomarium.cluster.http import bodies, openai_errors
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.replica.replica import Routing

LARGE_AT_ONCE = 2
"""Large bodies (bodies.LARGE) that are parsed at once: one of nothing but brackets takes some 25 times its bytes."""

CHARS_PER_TOKEN = 4
"""Of a prompt, about: whoever wants to know it takes a tokenizer, and the ingress has none."""

ENCODED = re.compile(r"[A-Za-z0-9+/=]{1024,}")
"""A picture in a prompt, as base64: its size says nothing of its tokens."""

PICTURE_TOKENS = 256

TIMEOUT_HEADER = "x-request-timeout"


@dataclass(frozen=True)
class Asking:
    """Attributes:
    name: of the model. tokens: of the prompt, about. timeout_s: for the answer, as the body says; None: it does not.
    """

    name: str
    routing: Routing
    tokens: int
    timeout_s: float | None


class Reader:
    """`models`: names of those that are served."""

    def __init__(self, models: Sequence[str]) -> None:
        self._models = list(models)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    async def read(self, path: str, body: bytes) -> Asking:
        """Raises RefusalError: `body` is no JSON object, or asks for no model that is served here."""
        if len(body) <= bodies.LARGE:
            return self._read(path, body)
        async with self._large:
            return await asyncio.to_thread(self._read, path, body)

    def _read(self, path: str, body: bytes) -> Asking:
        try:
            fields = bodies.parsed(body)
        except bodies.BodyError as error:
            raise RefusalError(*openai_errors.invalid(str(error), None)) from None
        name = self._model(fields)
        text = text_of(path, fields)
        return Asking(name, Routing(prefix_keys(text)), tokens_of(text), _timeout(fields.get("timeout"), "timeout"))

    def _model(self, fields: Mapping[str, Any]) -> str:
        """The one that is asked for, the only one if none is."""
        if fields.get("model") is not None:
            return self.known(fields["model"])
        if len(self._models) > 1:
            raise RefusalError(*openai_errors.model_required(self._models))
        return self._models[0]

    def known(self, name: object) -> str:
        """The name of a model that is served. Raises RefusalError (404)."""
        if isinstance(name, str) and name in self._models:
            return name
        raise RefusalError(*openai_errors.unknown_model(name, self._models))


def tokens_of(text: str) -> int:
    """Tokens of a prompt, about."""
    pictures = [found.end() - found.start() for found in ENCODED.finditer(text)]
    return -(-(len(text) - sum(pictures)) // CHARS_PER_TOKEN) + PICTURE_TOKENS * len(pictures)


def timeout_of(headers: Mapping[str, str], asking: Asking, otherwise: float | None) -> float | None:
    """Seconds for an answer: the shorter of what header and body say, `otherwise` if neither does; None: without end.

    Raises RefusalError (400): the header is no number of seconds.
    """
    given = headers.get(TIMEOUT_HEADER)
    by_header = None if given is None else _timeout(_number(given), "X-Request-Timeout")
    said = [seconds for seconds in (by_header, asking.timeout_s) if seconds is not None]
    return min(said, default=otherwise)


def _timeout(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RefusalError(*openai_errors.invalid(f"`{name}` must be a number of seconds above 0.", name))
    return float(value)


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text
