"""OpenAI's client uploads a file, has it answered as a batch, and finds both again after a restart of the endpoint.

The endpoint wants a key, and runs where all variables name a proxy that answers nothing, from a folder whose name is a
pattern of names (guarded.py).
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from guarded import AUTHORISED, Guarded
from openai import BadRequestError, NotFoundError, OpenAI
from rack_serving import until
from serve_process import CONTEXT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


HALF = "\ud83d"
"""Of an emoji's surrogate pair: JSON can name it, UTF-8 has no form of it."""


@pytest.fixture
def server(guarded_server: Guarded) -> Guarded:
    return guarded_server


def upload(client: OpenAI, folder: Path, count: int, tokens: int = 2) -> Any:
    path = folder / "in.jsonl"
    lines = []
    for number in range(count):
        body = {"model": "tiny", "prompt": f"abc {number}", "max_tokens": tokens, "ignore_eos": True}
        lines.append({"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body})
    lines[1]["body"]["max_tokens"] = -1
    lines[0]["custom_id"] = f"r0{HALF}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[" * 20_000 + "\n")
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="batch")


def create(client: OpenAI, source: str) -> Any:
    return client.batches.create(input_file_id=source, endpoint="/v1/completions", completion_window="24h")


def ended(client: OpenAI, name: str, seconds: float = 120) -> Any:
    def over() -> Any:
        batch = client.batches.retrieve(name)
        return batch if batch.status in ("completed", "failed", "cancelled") else None

    return until(over, seconds)


def test_a_batch_from_upload_to_results(server: Guarded, tmp_path: Path) -> None:
    client = server.client()
    source = upload(client, tmp_path, 6)
    assert (source.purpose, source.bytes) == ("batch", (tmp_path / "in.jsonl").stat().st_size)
    assert client.files.content(source.id).read() == (tmp_path / "in.jsonl").read_bytes()
    asked = {"input_file_id": source.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    # As JavaScript's clients send it; OpenAI's for Python has no way to.
    content = json.dumps({**asked, "metadata": {"half": HALF}})
    created = httpx.post(f"{server.url}/v1/batches", content=content, headers=AUTHORISED)
    assert created.status_code == 200, created.text
    batch = ended(client, created.json()["id"])
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (7, 5, 2)
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(r["custom_id"] for r in results) == [f"r0{HALF}", "r2", "r3", "r4", "r5"]
    assert all(r["response"]["status_code"] == 200 for r in results)
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    by_line = {error["line"]: error for error in errors}
    assert by_line[2]["response"]["status_code"] == 400
    assert by_line[7]["error"]["code"] == "invalid_json"
    assert source.id in [file.id for file in client.files.list()]
    assert [(each.id, each.metadata) for each in client.batches.list(limit=1)] == [(batch.id, {"half": HALF})]


def test_what_there_is_not(server: Guarded, tmp_path: Path) -> None:
    client = server.client()
    with pytest.raises(NotFoundError, match="There is no file"):
        client.files.retrieve("file-passwd")
    with pytest.raises(NotFoundError, match="There is no batch"):
        client.batches.retrieve("batch_000000000000000000000000")
    with pytest.raises(NotFoundError, match="There is no file"):
        create(client, "file-000000000000000000000000")
    with pytest.raises(BadRequestError, match="`endpoint` must be one of"):
        client.batches.create(input_file_id="x", endpoint="/v1/embeddings", completion_window="24h")
    path = tmp_path / "x.txt"
    path.write_text("x")
    with path.open("rb") as file, pytest.raises(BadRequestError, match="`purpose` must be"):
        client.files.create(file=file, purpose="assistants")


@pytest.mark.full
def test_a_batch_goes_on_after_a_restart_and_can_be_cancelled(server: Guarded, tmp_path: Path) -> None:
    client = server.client()
    # One request at a time would take minutes: more than a restart.
    source = upload(client, tmp_path, 400, tokens=400)
    batch = create(client, source.id)
    before = until(lambda: client.batches.retrieve(batch.id).request_counts.completed, 60)
    server.interrupt()
    server.start(["--port", str(server.port), "--max-model-len", str(CONTEXT), *server.arguments])
    until(lambda: "ready" in server.output, 200)
    again = until(lambda: (now := client.batches.retrieve(batch.id)).request_counts.completed >= before and now, 60)
    assert again.status in ("in_progress", "completed")
    client.batches.cancel(batch.id)
    cancelled = ended(client, batch.id)
    assert cancelled.status == "cancelled"
    lines = client.files.content(cancelled.output_file_id).text.splitlines()
    assert len({json.loads(line)["custom_id"] for line in lines}) == len(lines) == cancelled.request_counts.completed
    client.files.delete(source.id)
    with pytest.raises(NotFoundError):
        client.files.retrieve(source.id)
