"""Batches of the endpoint: their records on disk, and the runner that brings them to their end, over real HTTP."""

import asyncio
import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from endpoint_stub import Stub, serving
from recording_proxy import proxied
from starlette.responses import JSONResponse

from pomarium.cluster.batch import http_engine
from pomarium.cluster.batch.api import runner
from pomarium.cluster.batch.api import store as store_module
from pomarium.cluster.batch.api.runner import BatchRunner
from pomarium.cluster.batch.api.store import Batch, BatchStore, FileTooLargeError, State, UnknownIdError, new_id
from pomarium.cluster.batch.progress import Tally


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path / "store")


def upload(store: BatchStore, count: int, *more: str) -> str:
    lines = [
        json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": str(n)}})
        for n in range(count)
    ]
    content = "\n".join([*lines, *more]).encode()
    return store.add_file("in.jsonl", "batch", io.BytesIO(content)).id


def create(store: BatchStore, source: str) -> str:
    return store.add_batch(Batch(new_id("batch_"), "/v1/completions", source, "24h", 1000)).id


def run(store: BatchStore, url: str, until: Callable[[], bool], key: str | None = None) -> None:
    """The runner, until something is so; then it is killed."""

    async def both() -> None:
        task = asyncio.create_task(BatchRunner(str(store.folder), url, key).run_for_ever())
        async with asyncio.timeout(30):
            while not until():
                assert not task.done(), task.exception()
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(both())


def ids(store: BatchStore, name: str | None) -> list[str]:
    assert name is not None
    return sorted(json.loads(line)["custom_id"] for line in store.content(name).read_text().splitlines())


def test_a_batch_comes_to_its_end(store: BatchStore) -> None:
    name = create(store, upload(store, 5, "{broken"))
    assert store.batch(name).status is State.VALIDATING
    stub = Stub()
    with serving(stub) as url:
        run(store, url, lambda: store.batch(name).status.over, "secret")
    batch = store.batch(name)
    assert (batch.status, batch.counts.total, batch.counts.completed, batch.counts.failed) == ("completed", 6, 5, 1)
    assert ids(store, batch.output_file_id) == [f"r{n}" for n in range(5)]
    assert batch.error_file_id is not None
    assert json.loads(store.content(batch.error_file_id).read_text())["line"] == 6
    assert set(stub.keys) == {"Bearer secret"}
    card = batch.card()
    assert card["completed_at"] >= card["finalizing_at"] >= card["in_progress_at"] > 0
    assert card["errors"] is card["failed_at"] is None
    assert store.file(batch.output_file_id or "").purpose == "batch_output"


def test_no_proxy_of_the_environment_is_asked_for_the_endpoint(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = create(store, upload(store, 2))
    with proxied(monkeypatch) as proxy, serving(Stub()) as url:
        run(store, url, lambda: store.batch(name).status.over)
    assert (store.batch(name).status, store.batch(name).counts.completed) == (State.COMPLETED, 2)
    assert proxy.asked == []


def test_without_errors_there_is_no_error_file(store: BatchStore) -> None:
    name = create(store, upload(store, 1))
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(name).status.over)
    assert store.batch(name).error_file_id is None
    assert len(list(store.folder.glob("file-*"))) == 4, "two files, each with its record"


def test_batches_run_in_the_order_of_their_coming(store: BatchStore) -> None:
    source = upload(store, 1)
    first = store.add_batch(Batch(new_id("batch_"), "/v1/completions", source, "24h", 1000)).id
    second = store.add_batch(Batch(new_id("batch_"), "/v1/completions", source, "24h", 2000)).id
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(first).status.over)
        assert not store.batch(second).status.over
        run(store, url, lambda: store.batch(second).status.over)
    assert [batch.id for batch in store.batches()] == [second, first], "the latest is listed first"


def test_a_runner_that_was_killed_is_resumed_and_nothing_is_asked_twice(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_engine, "PAUSES_S", (30.0, 30.0))
    name = create(store, upload(store, 3))
    away = Stub(JSONResponse({"id": "x"}), JSONResponse({}, 503), JSONResponse({}, 503))
    with serving(away) as url:
        run(store, url, lambda: store.batch(name).counts.completed == 1)
    assert store.batch(name).status is State.IN_PROGRESS
    back = Stub()
    with serving(back) as url:
        run(store, url, lambda: store.batch(name).status.over)
    batch = store.batch(name)
    assert (batch.status, batch.counts.completed, len(back.keys)) == ("completed", 3, 2)
    assert ids(store, batch.output_file_id) == ["r0", "r1", "r2"]


def test_a_cancelled_batch_keeps_what_is_answered(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "PAUSES_S", (30.0, 30.0))
    name = create(store, upload(store, 2))
    with serving(Stub(JSONResponse({"id": "x"}), JSONResponse({}, 503))) as url:
        run(store, url, lambda: store.batch(name).counts.completed == 1)
        assert store.cancel(name).status is State.CANCELLING
        run(store, url, lambda: store.batch(name).status.over)
    batch = store.batch(name)
    assert (batch.status, batch.counts.completed) == ("cancelled", 1)
    assert len(ids(store, batch.output_file_id)) == 1
    assert store.cancel(name).status is State.CANCELLED, "what is over stays so"


def test_a_batch_whose_file_is_gone_fails_and_says_so(store: BatchStore) -> None:
    source = upload(store, 1)
    name = create(store, source)
    store.delete_file(source)
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(name).status.over)
    card = store.batch(name).card()
    assert card["status"] == "failed"
    assert source in card["errors"]["data"][0]["message"]
    assert card["output_file_id"] is card["error_file_id"] is None
    assert list(store.folder.glob("file-*")) == []


def test_a_batch_that_fails_half_way_names_the_file_of_what_was_answered(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = create(store, upload(store, 3))
    monkeypatch.setattr(Tally, "add", Mock(side_effect=ZeroDivisionError("a fault")))
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(name).status.over)
    batch = store.batch(name)
    assert (batch.status, batch.error_file_id) == (State.FAILED, None)
    assert store.file(batch.output_file_id or "").purpose == "batch_output"
    assert ids(store, batch.output_file_id)


def test_files_are_named_once_they_exist_and_as_long_as_they_do(store: BatchStore) -> None:
    name = create(store, upload(store, 1))
    named = []
    with serving(Stub()) as url:
        run(store, url, lambda: bool(named.append(store.batch(name).card()) or named[-1]["completed_at"]))
    assert {card["output_file_id"] for card in named if not card["completed_at"]} == {None}
    output = store.batch(name).output_file_id
    assert output is not None
    store.delete_file(output)
    assert store.batch(name).output_file_id is None


HALF = "\ud83d"
"""Of an emoji's surrogate pair: JSON can name it, UTF-8 has no form of it."""


def test_lines_of_any_text_and_depth_are_answered_or_refused_each_for_itself(store: BatchStore) -> None:
    line = {"custom_id": f"r{HALF}", "method": "POST", "url": "/v1/completions", "body": {"prompt": HALF}}
    lines = [json.dumps({**line, **change}) for change in ({}, {"body": {}}, {"url": HALF}, {"custom_id": f"r2{HALF}"})]
    name = create(store, upload(store, 1, *lines, '{"custom_id": ' + "[" * 20_000))
    stub = Stub()
    with serving(stub) as url:
        run(store, url, lambda: store.batch(name).counts.completed == 3)
        run(store, url, lambda: store.batch(name).status.over)
    batch = store.batch(name)
    assert (batch.status, batch.counts.completed, batch.counts.failed) == (State.COMPLETED, 3, 3)
    assert ids(store, batch.output_file_id) == ["r0", f"r2{HALF}", f"r{HALF}"]
    assert batch.error_file_id is not None
    errors = [json.loads(line) for line in store.content(batch.error_file_id).read_text().splitlines()]
    assert {error["line"]: error["error"]["code"] for error in errors} == {
        3: "duplicate_custom_id", 4: "invalid_url", 6: "invalid_json"
    }  # fmt: skip
    assert len(stub.keys) == 3, "what is answered is not asked again"


DAMAGES = {
    "empty": b"",
    "cut off": b'{"id": "',
    "no object": b"[1]",
    "nested": b"[" * 20_000,
    "of another id": b'{"id": "batch_x"}',
    "no numbers": b'{"created_at": null}',
    "not a number": b'{"metadata": {"a": NaN}}',
    "of an unknown state": b'{"status": "lost"}',
    "times that are none": b'{"times": [1]}',
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_keeps_nobody_from_anything(
    store: BatchStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = upload(store, 1)
    lost, well = create(store, source), create(store, source)
    other = upload(store, 2)
    for name in (lost, other):
        record, changed = store.folder / f"{name}.json", DAMAGES[damage]
        if changed.startswith(b"{") and changed.endswith(b"}"):
            changed = json.dumps(json.loads(record.read_text()) | json.loads(changed)).encode()
        record.write_bytes(changed)
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(well).status.over)
    for _ in range(2):
        assert [batch.id for batch in store.batches()] == [well]
        listed = [file.id for file in store.files()]
    assert source in listed
    assert caplog.text.count(f"The record of {lost} cannot be read") == 2, "once each by the runner's store and by ours"
    with pytest.raises(UnknownIdError, match="cannot be read"):
        store.batch(lost)
    assert (store.folder / f"{lost}.json").exists()
    if other not in listed:
        with pytest.raises(UnknownIdError, match="cannot be read"):
            store.file(other)
    store.delete_file(other)
    assert not store.content(other).exists()


def test_a_record_of_another_version_is_read(store: BatchStore) -> None:
    batch = Batch(new_id("batch_"), "/v1/completions", "file-1", "24h", 5)
    fields = json.loads(json.dumps(asdict(batch)))
    del fields["metadata"]
    (store.folder / f"{batch.id}.json").write_text(json.dumps(fields | {"a later field": 1}))
    assert store.batch(batch.id) == batch


def test_a_fault_of_ours_ends_its_batch_and_the_next_one_runs(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = create(store, upload(store, 1)), create(store, upload(store, 1))
    begin = BatchRunner._open

    def broken(runner: BatchRunner, batch: Batch) -> object:
        if batch.id == first:
            raise ZeroDivisionError("a fault")
        return begin(runner, batch)

    monkeypatch.setattr(BatchRunner, "_open", broken)
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(first).status.over and store.batch(second).status.over)
    assert (store.batch(first).status, store.batch(second).status) == ("failed", "completed")
    assert store.batch(first).error == "ZeroDivisionError: a fault"


def test_a_disk_that_is_full_for_a_while_delays_a_batch(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    name = create(store, upload(store, 1))
    monkeypatch.setattr(runner, "DISK_S", 0.01)
    write, full = BatchStore._write, [True, True]

    def written(store: BatchStore, record: str, fields: dict[str, object]) -> None:
        if full:
            full.pop()
            raise OSError(28, "No space left on device")
        write(store, record, fields)

    monkeypatch.setattr(BatchStore, "_write", written)
    with serving(Stub()) as url:
        run(store, url, lambda: store.batch(name).status.over)
    assert store.batch(name).status is State.COMPLETED


@pytest.mark.parametrize("name", ["file-../../etc/passwd", "file-1", "", "batch_" + "0" * 24, "file-" + "0" * 24])
def test_what_is_no_id_names_nothing(store: BatchStore, name: str) -> None:
    with pytest.raises(UnknownIdError):
        store.file(name)


def test_an_upload_that_is_too_large_leaves_nothing(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MOST_FILE_BYTES", 10)
    with pytest.raises(FileTooLargeError):
        store.add_file("big", "batch", io.BytesIO(bytes(11)))
    assert list(store.folder.iterdir()) == []


def test_records_come_back_as_they_were(store: BatchStore) -> None:
    batch = Batch(new_id("batch_"), "/v1/completions", "file-1", "24h", 5, metadata={"a": "b"}).entered(State.FAILED)
    store.put_batch(replace(batch, error="no"))
    assert store.batch(batch.id) == replace(batch, error="no")
