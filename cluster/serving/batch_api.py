"""`/v1/files` and `/v1/batches` of the ingress: OpenAI's Files and Batch API over a BatchStore.

    client --upload, create, retrieve, list, cancel--> these routes --BatchStore--> folder <-- batch_runner.py

Blocking work on the disk runs in threads. A batch's lines are looked at when it runs: those that cannot be asked are in
its error file, and do not fail the batch.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, JSONResponse, Response

from pomarium.cluster.batch.lines import URLS
from pomarium.cluster.serving import openai_errors
from pomarium.cluster.serving.batch_store import (
    Batch,
    BatchStore,
    FileTooLargeError,
    StoredFile,
    UnknownIdError,
    new_id,
)
from pomarium.cluster.serving.relay import RefusalError

PURPOSE = "batch"
MOST_LISTED = 100
WINDOWS = ("24h",)


def refuse(message: str, param: str | None = None) -> RefusalError:
    """A request that asks for what there is not."""
    return RefusalError(*openai_errors.invalid(message, param))


async def upload(store: BatchStore, request: Request) -> Response:
    """POST /v1/files: multipart form with `purpose` and `file`."""
    async with request.form(max_files=1, max_fields=10) as form:
        purpose, file = form.get("purpose"), form.get("file")
        if purpose != PURPOSE:
            raise refuse(f"`purpose` must be {PURPOSE!r}, not {purpose!r}.", "purpose")
        if not isinstance(file, UploadFile):
            raise refuse("`file` must be a file.", "file")
        try:
            stored = await asyncio.to_thread(store.add_file, file.filename or "batch.jsonl", PURPOSE, file.file)
        except FileTooLargeError as error:
            raise refuse(str(error), "file") from None
        except OSError as error:
            raise RefusalError(*openai_errors.http(507, f"The file cannot be kept: {error.strerror}.")) from error
    return JSONResponse(stored.card())


async def files(store: BatchStore, request: Request) -> Response:
    """GET /v1/files."""
    found = await asyncio.to_thread(store.files)
    return _page([(file.id, file.card()) for file in found], request)


async def file(store: BatchStore, name: str) -> Response:
    """GET /v1/files/ID."""
    return JSONResponse((await _file(store, name)).card())


async def content(store: BatchStore, name: str) -> Response:
    """GET /v1/files/ID/content."""
    await _file(store, name)
    return FileResponse(store.content(name), media_type="application/jsonl")


async def delete(store: BatchStore, name: str) -> Response:
    """DELETE /v1/files/ID."""
    try:
        await asyncio.to_thread(store.delete_file, name)
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None
    return JSONResponse({"id": name, "object": "file", "deleted": True})


async def create(store: BatchStore, request: Request) -> Response:
    """POST /v1/batches."""
    try:
        fields = await request.json()
    except ValueError as error:
        raise RefusalError(*openai_errors.invalid_json(str(error))) from None
    if not isinstance(fields, dict):
        raise RefusalError(*openai_errors.invalid_json("it must be an object"))
    endpoint, window, metadata = fields.get("endpoint"), fields.get("completion_window"), fields.get("metadata")
    if endpoint not in URLS:
        raise refuse(f"`endpoint` must be one of {', '.join(URLS)}, not {endpoint!r}.", "endpoint")
    if window not in WINDOWS:
        raise refuse(f"`completion_window` must be {' or '.join(WINDOWS)}, not {window!r}.", "completion_window")
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise refuse("`metadata` must be an object of strings.", "metadata")
    source = await _file(store, str(fields.get("input_file_id")))
    if source.purpose != PURPOSE:
        raise refuse(f"{source.id} was not uploaded for batches.", "input_file_id")
    batch = Batch(new_id("batch_"), endpoint, source.id, window, int(time.time()), metadata=metadata)
    return JSONResponse((await asyncio.to_thread(store.add_batch, batch)).card())


async def batches(store: BatchStore, request: Request) -> Response:
    """GET /v1/batches."""
    found = await asyncio.to_thread(store.batches)
    return _page([(batch.id, batch.card()) for batch in found], request)


async def batch(store: BatchStore, name: str) -> Response:
    """GET /v1/batches/ID."""
    try:
        return JSONResponse((await asyncio.to_thread(store.batch, name)).card())
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None


async def cancel(store: BatchStore, name: str) -> Response:
    """POST /v1/batches/ID/cancel."""
    try:
        return JSONResponse((await asyncio.to_thread(store.cancel, name)).card())
    except UnknownIdError as error:
        raise RefusalError(*openai_errors.unknown(str(error))) from None


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
    return JSONResponse(
        {
            "object": "list",
            "data": [card for _, card in page],
            "first_id": page[0][0] if page else None,
            "last_id": page[-1][0] if page else None,
            "has_more": len(found) > first + limit,
        }
    )
