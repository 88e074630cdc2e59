"""Routes as an ASGI application whose errors are OpenAI's, whatever raises them; Anthropic's on its own paths.

RefusalError, no such route, a fault of ours --response--> {"error": {...}}
"""

import logging
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from pomarium.cluster.http import openai_errors, protocols
from pomarium.cluster.http.openai_errors import RefusalError

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status that nobody gets to see, after nginx."""


def application(routes: Sequence[BaseRoute]) -> Starlette:
    """`routes` as an application."""
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(_KINDS, _answered))


async def _answered(request: Request, error: Exception) -> Response:
    return response(request, error)


def response(request: Request, error: Exception) -> Response:
    """What the client of a request that ended with `error` is told. A fault of ours is logged."""
    path = request.url.path
    if isinstance(error, RefusalError):
        body = protocols.error_body(path, error.status, error.body)
        return JSONResponse(body, error.status, headers=error.headers)
    if isinstance(error, HTTPException):
        said = f"{request.method} {openai_errors.shown(path)}: {error.detail}."
        status, body = openai_errors.http(error.status_code, said)
        return JSONResponse(protocols.error_body(path, status, body), status, headers=error.headers)
    if isinstance(error, ClientDisconnect):  # or its body was refused (door.py) before all of it was there
        return Response(status_code=CLIENT_LEFT)
    request_id = request.headers.get("x-request-id", "?")
    logger.error("request %s failed", request_id, exc_info=error)
    status, body = openai_errors.internal(request_id)
    return JSONResponse(protocols.error_body(path, status, body), status)


_KINDS = (RefusalError, HTTPException, ClientDisconnect, Exception)
