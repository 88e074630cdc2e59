"""`/v1/files` and `/v1/batches` of the ingress: OpenAI's Files and Batch API over a BatchStore.

    client --upload, create, retrieve, list, cancel--> these routes --BatchStore--> folder <-- runner.py

Blocking work on the disk runs in threads. A batch's lines are looked at when it runs: those that cannot be asked are in
its error file, and do not fail the batch. What clients write (file names, metadata) comes back as it came.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from pomarium.cluster.batch.api.store import (
    Batch,
    BatchStore,
    FileTooLargeError,
    StoredFile,
    UnknownIdError,
    new_id,
)
from pomarium.cluster.batch.lines import URLS, shown
from pomarium.cluster.http import openai_errors
from pomarium.cluster.http.escaped_json import EscapedJson
from pomarium.cluster.http.openai_errors import RefusalError

PURPOSE = "batch"
MOST_LISTED = 100
WINDOWS = ("24h",)
MOST_METADATA, MOST_KEY, MOST_VALUE = 16, 64, 512
"""OpenAI's limits of `metadata`: pairs, and characters of a key and of a value."""
MOST_FILENAME = 1024
"""Characters; file systems take 255 bytes."""


Handler = Callable[[BatchStore, Request], Awaitable[Response]]


def mounted(store_of: Callable[[Request], BatchStore], begun: Callable[[], None]) -> list[Route]:
    """The routes.

    Args:
        store_of: of whoever sent a request; raises RefusalError if it may not ask.
        begun: called when there is one more batch to run.
    """

    def on(method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            return await handler(store_of(request), request)

        return Route(path, endpoint, methods=[method], name=handler.__name__)

    async def begin(store: BatchStore, request: Request) -> Response:
        created = await create(store, request)
        begun()
        return created

    return [
        on("POST", "/v1/files", upload),
        on("GET", "/v1/files", files),
        on("GET", "/v1/files/{name}", file),
        on("GET", "/v1/files/{name}/content", content),
        on("DELETE", "/v1/files/{name}", delete),
        on("POST", "/v1/batches", begin),
        on("GET", "/v1/batches", batches),
        on("GET", "/v1/batches/{name}", batch),
        on("POST", "/v1/batches/{name}/cancel", cancel),
    ]


def refuse(message: str, param: str | None = None) -> RefusalError:
    """A request that asks for what there is not."""
    return RefusalError(*openai_errors.invalid(message, param))


async def upload(store: BatchStore, request: Request) -> Response:
    """POST /v1/files: multipart form with `purpose` and `file`."""
    form = await _form(request)
    try:
        purpose, file = form.get("purpose"), form.get("file")
        if purpose != PURPOSE:
            raise refuse(f"`purpose` must be {PURPOSE!r}, not {shown(purpose)}.", "purpose")
        if not isinstance(file, UploadFile):
            raise refuse("`file` must be a file.", "file")
        if len(file.filename or "") > MOST_FILENAME:
            raise refuse(f"The file's name is longer than {MOST_FILENAME} characters.", "file")
        try:
            stored = await asyncio.to_thread(store.add_file, file.filename or "batch.jsonl", PURPOSE, file.file)
        except FileTooLargeError as error:
            raise refuse(str(error), "file") from None
        except OSError as error:
            raise RefusalError(*openai_errors.http(507, f"The file cannot be kept: {error.strerror}.")) from error
    finally:
        await form.close()
    return EscapedJson(stored.card())


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=1, max_fields=10)
    except UnicodeError as error:  # the client names the charset of the names
        raise refuse(f"The form's names cannot be read: {error}.") from None


async def files(store: BatchStore, request: Request) -> Response:
    """GET /v1/files."""
    found = await asyncio.to_thread(store.files)
    return _page([(file.id, file.card()) for file in found], request)


async def file(store: BatchStore, request: Request) -> Response:
    """GET /v1/files/ID."""
    return EscapedJson((await _named(store, request)).card())


async def content(store: BatchStore, request: Request) -> Response:
    """GET /v1/files/ID/content."""
    return FileResponse(store.content((await _named(store, request)).id), media_type="application/jsonl")


async def delete(store: BatchStore, request: Request) -> Response:
    """DELETE /v1/files/ID."""
    name = request.path_params["name"]
    try:
        await asyncio.to_thread(store.delete_file, name)
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None
    return EscapedJson({"id": name, "object": "file", "deleted": True})


async def create(store: BatchStore, request: Request) -> Response:
    """POST /v1/batches."""
    try:
        fields = json.loads(await request.body())
    except ValueError as error:
        raise RefusalError(*openai_errors.invalid_json(str(error))) from None
    except RecursionError:
        raise RefusalError(*openai_errors.invalid_json("it is nested too deeply")) from None
    if not isinstance(fields, dict):
        raise RefusalError(*openai_errors.invalid_json("it must be an object"))
    endpoint, window, metadata = fields.get("endpoint"), fields.get("completion_window"), fields.get("metadata")
    if endpoint not in URLS:
        raise refuse(f"`endpoint` must be one of {', '.join(URLS)}, not {shown(endpoint)}.", "endpoint")
    if window not in WINDOWS:
        raise refuse(f"`completion_window` must be {' or '.join(WINDOWS)}, not {shown(window)}.", "completion_window")
    _check_metadata(metadata)
    name = fields.get("input_file_id")
    if not isinstance(name, str):
        raise refuse("`input_file_id` must be a string.", "input_file_id")
    source = await _file(store, name)
    if source.purpose != PURPOSE:
        raise refuse(f"{source.id} was not uploaded for batches.", "input_file_id")
    batch = Batch(new_id("batch_"), endpoint, source.id, window, int(time.time()), metadata=metadata)
    return EscapedJson((await asyncio.to_thread(store.add_batch, batch)).card())


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise refuse("`metadata` must be an object of strings.", "metadata")
    if (
        len(metadata) > MOST_METADATA
        or any(len(key) > MOST_KEY for key in metadata)
        or any(len(value) > MOST_VALUE for value in metadata.values())
    ):
        raise refuse(
            f"`metadata` may have {MOST_METADATA} pairs, keys of {MOST_KEY} characters and values of {MOST_VALUE}.",
            "metadata",
        )


async def batches(store: BatchStore, request: Request) -> Response:
    """GET /v1/batches."""
    found = await asyncio.to_thread(store.batches)
    return _page([(batch.id, batch.card()) for batch in found], request)


async def batch(store: BatchStore, request: Request) -> Response:
    """GET /v1/batches/ID."""
    try:
        return EscapedJson((await asyncio.to_thread(store.batch, request.path_params["name"])).card())
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None


async def cancel(store: BatchStore, request: Request) -> Response:
    """POST /v1/batches/ID/cancel."""
    try:
        return EscapedJson((await asyncio.to_thread(store.cancel, request.path_params["name"])).card())
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None


async def _named(store: BatchStore, request: Request) -> StoredFile:
    return await _file(store, request.path_params["name"])


async def _file(store: BatchStore, name: str) -> StoredFile:
    try:
        return await asyncio.to_thread(store.file, name)
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None


def _page(found: Sequence[tuple[str, dict[str, Any]]], request: Request) -> Response:
    """A list, from behind `after` on, of at most `limit`."""
    try:
        limit = int(request.query_params.get("limit", MOST_LISTED))
    except ValueError:
        raise refuse("`limit` must be a number.", "limit") from None
    if not 1 <= limit <= 10_000:
        raise refuse("`limit` must be from 1 to 10000.", "limit")
    names = [name for name, _ in found]
    after = request.query_params.get("after")
    first = names.index(after) + 1 if after in names else 0
    page = found[first : first + limit]
    return EscapedJson(
        {
            "object": "list",
            "data": [card for _, card in page],
            "first_id": page[0][0] if page else None,
            "last_id": page[-1][0] if page else None,
            "has_more": len(found) > first + limit,
        }
    )
