from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Call(_message.Message):
    __slots__ = ("seq", "method", "wants_result", "payload")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    WANTS_RESULT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    seq: int
    method: str
    wants_result: bool
    payload: bytes
    def __init__(self, seq: _Optional[int] = ..., method: _Optional[str] = ..., wants_result: _Optional[bool] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("ready", "result", "failure")
    READY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ready: Ready
    result: Result
    failure: Failure
    def __init__(self, ready: _Optional[_Union[Ready, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("pid", "pomarium_version", "python_version")
    PID_FIELD_NUMBER: _ClassVar[int]
    POMARIUM_VERSION_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    pid: int
    pomarium_version: str
    python_version: str
    def __init__(self, pid: _Optional[int] = ..., pomarium_version: _Optional[str] = ..., python_version: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("seq", "payload")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    seq: int
    payload: bytes
    def __init__(self, seq: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("seq", "method", "error", "message", "traceback")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    seq: int
    method: str
    error: str
    message: str
    traceback: str
    def __init__(self, seq: _Optional[int] = ..., method: _Optional[str] = ..., error: _Optional[str] = ..., message: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...
