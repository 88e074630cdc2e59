"""The routes of files and batches: what clients write comes back as it came, or is refused; never a fault of ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pomarium.cluster.batch.api import routes
from pomarium.cluster.batch.api.store import BatchStore
from pomarium.cluster.http import openai_app
from pomarium.cluster.http.escaped_json import EscapedJson

HALF = "\ud83d"
"""Of an emoji's surrogate pair: JSON can name it, UTF-8 has no form of it."""


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    store = BatchStore(tmp_path)
    app = openai_app.application(routes.mounted(lambda _: store, lambda: None))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def upload(
    client: TestClient, filename: bytes = b"in.jsonl", charset: bytes = b"utf-8", purpose: bytes = b"batch"
) -> Any:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n%s\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n{}\r\n--x--\r\n'
    ) % (purpose, filename)
    kind = b"multipart/form-data; boundary=x; charset=" + charset
    return client.post("/v1/files", content=body, headers={"content-type": kind.decode()})


def create(client: TestClient, **fields: Any) -> Any:
    source = upload(client).json()["id"]
    fields = {"input_file_id": source, "endpoint": "/v1/completions", "completion_window": "24h", **fields}
    return client.post("/v1/batches", content=json.dumps(fields))


def test_metadata_comes_back_as_it_came(client: TestClient) -> None:
    metadata = {f"a{HALF}": f"{HALF} caf\u00e9", "b": "\U0001f34e"}
    for _ in range(2):
        answer = create(client, metadata=metadata)
        assert (answer.status_code, json.loads(answer.content)["metadata"]) == (200, metadata)
        assert "\U0001f34e".encode() in answer.content, "what UTF-8 holds is UTF-8"
    listed = client.get("/v1/batches")
    assert listed.status_code == 200
    assert [json.loads(listed.content)["data"][n]["metadata"] for n in (0, 1)] == [metadata, metadata]


@pytest.mark.parametrize(
    ("filename", "charset", "shown"),
    [
        (b"+2D0-.jsonl", b"utf-7", f"{HALF}.jsonl"),
        (b"\xf0\x9f.jsonl", b"utf-8", "\xf0\x9f.jsonl"),
        ("\U0001f34e".encode(), b"utf-8", "\U0001f34e"),
        (b"a.jsonl", b"no-such-charset", "a.jsonl"),
    ],
)
def test_a_file_has_any_name(client: TestClient, filename: bytes, charset: bytes, shown: str) -> None:
    assert upload(client, filename, charset).status_code == 200
    listed = client.get("/v1/files")
    assert (listed.status_code, json.loads(listed.content)["data"][0]["filename"]) == (200, shown)


def test_a_form_that_cannot_be_read_is_refused(client: TestClient) -> None:
    answers = [
        upload(client, b"a", b"undefined"),
        upload(client, b"a" * 2000),
        upload(client, purpose=b"p" * 5000),
        upload(client, purpose=b"\xff"),
    ]
    assert [answer.status_code for answer in answers] == [400] * 4
    assert all(len(answer.content) < 500 for answer in answers)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": [HALF]}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"endpoint": HALF * 5000}, "endpoint"),
        ({"endpoint": {"a": [HALF]}}, "endpoint"),
        ({"completion_window": HALF}, "completion_window"),
        ({"input_file_id": [HALF]}, "input_file_id"),
    ],
)
def test_what_cannot_be_asked_is_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = create(client, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(answer.content) < 500
    assert client.get("/v1/batches").json()["data"] == []


def test_an_unknown_file_of_any_name(client: TestClient) -> None:
    answer = create(client, input_file_id=f"file-{HALF}" + "x" * 5000)
    assert (answer.status_code, len(answer.content) < 500) == (404, True)


@pytest.mark.parametrize("body", [b"[" * 20_000, b'{"metadata":' * 20_000, b"{", b"\xff", b"[]", b""])
def test_a_body_that_is_none(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/batches", content=body)
    assert (answer.status_code, "not valid JSON" in answer.json()["error"]["message"]) == (400, True)


def test_every_text_of_json_leaves_as_json() -> None:
    text = " ".join(map(chr, [*range(0x250), *range(0xD7F0, 0xE010), 0xFFFF, 0x1F34E]))
    assert json.loads(EscapedJson({text: [text]}).body) == {text: [text]}
