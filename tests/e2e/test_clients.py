"""Clients that people bring along, each a program: it asks, streams, calls a tool, reads an error, leaves."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from agent_session import ENOUGH, replayed, shares, told
from client_programs import PROGRAMS, STEPS, NoNodeError, Program, node, took
from openai import APIError
from rack_serving import until
from serve_process import MODEL, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

KEY = "sk-of-the-clients"
ENDLESS = 900
"""Tokens that each program asks for in the stream that it leaves (tests/clients/told.py)."""
PARSER = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    arguments = [*PARSER, "--enable-prompt-tokens-details", "--max-model-len", "4096", "--failovers", "0"]
    server = Server(folder, arguments, {"POMARIUM_API_KEY": KEY}, KEY)
    server.ensure()
    yield server
    server.end()


@pytest.fixture(scope="module", params=PROGRAMS, ids=lambda program: program.file)
def program(request: pytest.FixtureRequest) -> Program:
    found: Program = request.param
    if not found.in_python:
        try:
            node()
        except NoNodeError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"{error}: clients for it are not run")
    return found


def generated(server: Server) -> float:
    page = httpx.get(f"{server.url}/metrics", headers={"x-api-key": KEY}, timeout=30).text
    lines = [line for line in page.splitlines() if line.startswith("ray_vllm_generation_tokens_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def rested(server: Server) -> float:
    """Tokens generated, once there come no more."""
    counts = [generated(server)]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (len(counts) > 8 and counts[-1] == counts[-8]):
        time.sleep(1)
        counts.append(generated(server))
    assert counts[-1] == counts[-8], counts
    return counts[-1]


def called(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def test_a_client_does_all_that_the_page_says(server: Server, program: Program) -> None:
    before = generated(server)
    with took(program, server.url, KEY, MODEL) as gave:
        after = rested(server)
    assert tuple(gave) == STEPS
    assert "Paris" in gave["chat"]
    assert gave["stream"] == gave["chat"] or "Paris" in gave["stream"]
    arguments, said = gave["tools"]
    assert called(arguments)["city"] in ("Paris", "Rome")
    assert said
    assert gave["structured"] in ("Paris", "Rome")
    assert "The model `nobody` does not exist. Served here: smollm2." in gave["error"]
    assert gave["disconnect"] > 0
    assert after - before < ENDLESS, "the engine went on with what nobody reads"


def test_an_agent_s_turns_find_the_turns_before_them_in_the_cache(server: Server) -> None:
    """Two sessions in turn; on two engines: test_replica_routing.py."""
    for path, turns in replayed(server.url, KEY, MODEL).items():
        print(told(path, turns))
        assert min(shares(turns)) >= ENOUGH, told(path, turns)


def test_a_batch_of_responses(server: Server, tmp_path: Path) -> None:
    client, path = server.client(), tmp_path / "in.jsonl"
    bodies: list[dict[str, Any]] = [{"input": "Say hello.", "max_output_tokens": 4}, {"input": "x", "store": True}]
    path.write_text(
        "".join(
            json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/responses", "body": body}) + "\n"
            for i, body in enumerate(bodies)
        )
    )
    with path.open("rb") as file:
        source = client.files.create(file=file, purpose="batch")
    created = client.batches.create(input_file_id=source.id, endpoint="/v1/responses", completion_window="24h")
    batch = until(lambda: (now := client.batches.retrieve(created.id)).status == "completed" and now, 120, server.log)
    (result,) = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert (result["custom_id"], result["response"]["body"]["object"]) == ("r0", "response")
    (refused,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert refused["response"]["body"]["error"]["message"].startswith("`store` ")


def test_a_lost_engine_ends_a_stream_in_the_words_of_its_protocol(server: Server) -> None:
    """Comes last: the engine is not waited for."""
    endless = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "string", "minLength": 20_000}}}}
    body = {"model": MODEL, "max_tokens": 3000, "messages": [{"role": "user", "content": "Go on."}], "stream": True}
    responses = server.client().responses.create(
        model=MODEL, input="Go on.", max_output_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    with httpx.stream(
        "POST", f"{server.url}/v1/messages", json=body | endless, headers={"x-api-key": KEY}, timeout=300
    ) as messages:
        lines = messages.iter_lines()
        assert any("content_block_delta" in line for line in lines)
        assert any(event.type == "response.output_text.delta" for event in responses)
        for process in server.processes():
            if "WorkerActor" in " ".join(process.cmdline()):
                process.kill()
        *_, name, data, _ = lines
        with pytest.raises(APIError, match="crashed or was killed"):
            list(responses)
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert (told["type"], told["error"]["type"]) == ("error", "overloaded_error")
    assert "crashed or was killed" in told["error"]["message"]
