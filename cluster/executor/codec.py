"""Pickles and exceptions across the control stream: the payloads of `proto/control.proto`.

    (method, args, kwargs) --encode_call--> bytes --decode--> (method, args, kwargs)
    exception in the worker --describe--> Failure --rebuild--> exception in the engine

Pickles are read only from a peer that the token has proved (`service`, `link`).
"""

import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from pomarium.proto import control_pb2 as pb
from pomarium.worker.errors import PomariumError

Method = str | Callable[..., Any]
Invocation = tuple[Method, tuple[Any, ...], dict[str, Any]]


class WorkerError(RuntimeError):
    """A call raised in the worker by our fault; the message carries the worker's traceback."""


class WorkerLostError(RuntimeError):
    """A worker's process, node or connection is gone, or it did not answer in time."""


def encode(value: object) -> bytes:
    """Pickle of `value`; by value (several times slower) only for what plain pickle refuses."""
    try:
        return pickle.dumps(value, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):
        return bytes(cloudpickle.dumps(value, protocol=5))


def encode_call(method: Method, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> bytes:
    """Payload of a Call. A callable travels by value: the worker need not be able to import the caller's module."""
    invocation: Invocation = (method, args, dict(kwargs or {}))
    return encode(invocation) if isinstance(method, str) else bytes(cloudpickle.dumps(invocation, protocol=5))


def decode(payload: bytes) -> Any:
    """Value of a payload. Raises what unpickling raises."""
    return pickle.loads(payload)


def method_name(method: Method) -> str:
    """Name of a call for logs and reports."""
    return method if isinstance(method, str) else repr(method)


def describe(seq: int, method: str, error: BaseException) -> pb.Failure:
    """What the worker reports of an exception."""
    return pb.Failure(
        seq=seq,
        method=method,
        error=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )


def rebuild(failure: pb.Failure, worker: str) -> Exception:
    """The exception to raise in the engine: a PomariumError as it was, else WorkerError with the worker's traceback."""
    if user_error := _user_errors().get(failure.error):
        return user_error(failure.message)
    summary = f"{worker}: {failure.method} raised {failure.error}: {failure.message}"
    return WorkerError(f"{summary}\n{failure.traceback}")


def _user_errors() -> dict[str, type[PomariumError]]:
    kinds: list[type[PomariumError]] = [PomariumError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return {kind.__name__: kind for kind in kinds}
