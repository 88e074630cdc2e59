"""What vLLM's HTTP application answers to a request of a wrong form: one sentence, and the place in the body.

    RequestValidationError, ValidationError --intake/forms.py--> {"error": {message, type, param, code}}, 400

vLLM's own answer prints pydantic's errors as Python writes them, all that there are. Its handlers are taken from the
module's names when the application is built (vllm/entrypoints/serve/exception_handling/register.py; vLLM 0.29). Another
protocol's body is made of it by the guard (intake/guard.py).
"""

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling import register

from pomarium.cluster.engine.intake import forms
from pomarium.cluster.http import openai_errors

NO_JSON = "The request's body must be JSON, with the header `Content-Type: application/json`."

_others = register.exception_handler


def install() -> None:
    """For the applications that this process builds from now on. Calling it again changes nothing."""
    register.validation_exception_handler = _answer
    register.exception_handler = _answer_or_others


async def _answer(request: Request, error: RequestValidationError) -> JSONResponse:
    errors = error.errors()
    if not errors or not isinstance(errors[0], dict):  # vLLM's, of the header: it does not say of which place
        return _told(openai_errors.invalid(NO_JSON, None))
    # FastAPI puts before each place where the value came from: `body`.
    return _fault([one | {"loc": one["loc"][1:]} for one in errors], error.body)


async def _answer_or_others(request: Request, error: Exception) -> Any:
    if not isinstance(error, ValidationError):
        return await _others(request, error)
    return _fault(error.errors(include_url=False), await request.json())  # which the application has read


def _fault(errors: Any, body: Any) -> JSONResponse:
    found = forms.fault(errors, body)
    return _told(openai_errors.invalid(found.sentence, found.place or None))


def _told(answer: tuple[int, dict[str, Any]]) -> JSONResponse:
    status, body = answer
    return JSONResponse(body, status)
