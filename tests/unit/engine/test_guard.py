"""The guard before vLLM's application: who passes finds the request as it came, who does not gets 400, nobody waits."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pomarium.cluster.engine.intake import grammars
from pomarium.cluster.engine.intake.constraints import Constraint
from pomarium.cluster.engine.intake.conversations import NO_CALLS, Abilities
from pomarium.cluster.engine.intake.guard import Guard, Rules, rules_of
from pomarium.cluster.http.asgi import Message

RULES = Rules(chars=5_000, compiles=True)
DEADLINE_S = 30.0


class Application:
    """Answers with what it was given; keeps every message."""

    def __init__(self) -> None:
        self.received: list[Message] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"through"})
        if scope.get("waits"):
            self.received.append(await receive())


class Client:
    """Sends `pieces`, then is silent until it leaves."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self.gone = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self._pieces:
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.sent[1]["body"])["error"])


def scope(
    method: str = "POST", kind: bytes = b"application/json", path: str = "/v1/chat/completions", **more: Any
) -> Message:
    return {"type": "http", "method": method, "path": path, "headers": [(b"content-type", kind)], **more}


def ask(*pieces: bytes, rules: Rules = RULES, **more: Any) -> tuple[Client, Application]:
    async def run() -> tuple[Client, Application]:
        client, application = Client(*pieces), Application()
        await asyncio.wait_for(Guard(application, rules)(scope(**more), client.receive, client.send), DEADLINE_S)
        return client, application

    return asyncio.run(run())


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "x", **fields}).encode()


def test_an_ordinary_request_passes_unchanged() -> None:
    whole = body(structured_outputs={"choice": ["a", "b"]})
    client, application = ask(whole[:7], whole[7:20], whole[20:])
    assert application.received == [{"type": "http.request", "body": whole, "more_body": False}]
    assert client.status == 200


def test_a_client_that_leaves_later_is_seen_by_the_application() -> None:
    async def run() -> list[Message]:
        client, application = Client(body()), Application()
        running = asyncio.ensure_future(Guard(application, RULES)(scope(waits=True), client.receive, client.send))
        while len(client.sent) < 2:
            await asyncio.sleep(0)
        client.gone.set()
        await asyncio.wait_for(running, DEADLINE_S)
        return application.received

    assert [message["type"] for message in asyncio.run(run())] == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{nope", "not valid JSON"),
        (b'{"metadata": ' + b"[" * 2_000 + b"]" * 2_000 + b"}", "nested deeper"),
        (b'{"stop": "\\ud83d"}', "surrogate"),
        (body(prompt="x" * 6_000), "characters"),
        (body(prompt=list(range(6_000))), "token ids"),
        (body(structured_outputs={"regex": "a{9000000}"}), "repeats"),
        (body(structured_outputs={"regex": "[0-9"}), "regex"),
        (body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}), "text"),
        (body(messages=[{"tool_calls": [{"function": {"arguments": "[" * 900}}]}]), "arguments"),
    ],
)
def test_what_would_raise_or_hold_everybody_is_a_400(content: bytes, words: str) -> None:
    client, application = ask(content)
    assert application.received == []
    assert client.status == 400
    assert words in client.error["message"]
    assert client.error["code"] == 400


@pytest.mark.parametrize(
    "more", [{"method": "GET"}, {"kind": b"multipart/form-data"}, {"kind": b"audio/wav"}, {"type": "websocket"}]
)
def test_what_is_no_json_request_is_not_touched(more: dict[str, Any]) -> None:
    _, application = ask(b"{nope", **more)
    assert application.received == [{"type": "http.request", "body": b"{nope", "more_body": False}]


@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "background", "store"])
def test_responses_that_a_server_would_have_to_keep_are_refused(field: str) -> None:
    client, application = ask(body(**{field: True}), path="/v1/responses")
    assert application.received == []
    assert client.status == 400
    assert client.error["message"].startswith(f"`{field}` ")
    assert ask(body(**{field: False}), path="/v1/responses")[0].status == 200, "as those send it who know"
    assert ask(body(**{field: True}))[0].status == 200, "what it says in another protocol is vLLM's affair"


class Refusing:
    """An application that answers with `status` and `content`, in two pieces."""

    def __init__(self, status: int, content: bytes) -> None:
        self._status, self._content = status, content

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self._status, "headers": []})
        await send({"type": "http.response.body", "body": self._content[:5], "more_body": True})
        await send({"type": "http.response.body", "body": self._content[5:]})


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (400, b'{"error": {"message": "No.", "type": "BadRequestError"}}', ("invalid_request_error", "No.")),
        (404, b'{"type": "error", "error": {"message": "No.", "type": "NotFoundError"}}', ("not_found_error", "No.")),
        (500, b"no JSON \xff", ("api_error", "no JSON \ufffd")),
        (422, b'["error"]', ("invalid_request_error", '["error"]')),
        (503, b'{"error": "text"}', ("overloaded_error", '{"error": "text"}')),
    ],
)
def test_whatever_refuses_anthropic_s_clients_read_their_own_errors(
    status: int, content: bytes, error: tuple[str, str]
) -> None:
    async def run(path: str) -> Client:
        client = Client(body())
        await Guard(Refusing(status, content), RULES)(scope(path=path), client.receive, client.send)
        return client

    client = asyncio.run(run("/v1/messages"))
    told = json.loads(client.sent[1]["body"])
    assert (client.status, told["type"], len(client.sent)) == (status, "error", 2)
    assert (told["error"]["type"], told["error"]["message"]) == error
    plain = asyncio.run(run("/v1/completions"))
    assert b"".join(message["body"] for message in plain.sent[1:]) == content


def test_the_guard_s_own_refusals_are_anthropic_s_there() -> None:
    client, _ = ask(b"{nope", path="/v1/messages")
    assert (client.status, client.error["type"]) == (400, "invalid_request_error")


def test_an_empty_body_is_the_applications_affair() -> None:
    assert ask(b"")[0].status == 200


def test_where_another_compiler_answers_only_sizes_are_bounded() -> None:
    rules = Rules(chars=5_000, compiles=False)
    assert ask(body(structured_outputs={"regex": "[0-9"}), rules=rules)[0].status == 200
    assert ask(body(structured_outputs={"regex": "a{9000000}"}), rules=rules)[0].status == 400


class Compiler:
    """Stands for grammars.fault: takes as long as it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []

    def __call__(self, constraint: Constraint, *, any_whitespace: bool = True) -> str | None:
        self.asked.append(constraint.text)
        self.go.wait(DEADLINE_S)
        return None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_loop_goes_on_while_a_constraint_is_compiled_and_nothing_is_for_who_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(grammars, "fault", compiler)

    async def run() -> list[list[Message]]:
        application = Application()
        guard = Guard(application, RULES)
        clients = [Client(body(structured_outputs={"regex": text})) for text in ("first", "left", "third")]
        clients.append(Client(body()))
        running = [asyncio.ensure_future(guard(scope(), client.receive, client.send)) for client in clients]
        await until(lambda: bool(clients[3].sent))  # has no constraint, so waits for nobody
        await until(lambda: compiler.asked == ["first"])
        clients[1].gone.set()
        await until(running[1].done)
        compiler.go.set()
        await asyncio.wait_for(asyncio.gather(*running), DEADLINE_S)
        return [client.sent for client in clients]

    first, left, third, plain = asyncio.run(run())
    assert compiler.asked == ["first", "third"]
    assert left == []
    assert [answer[0]["status"] for answer in (first, third, plain)] == [200, 200, 200]


def test_what_the_model_cannot_take_is_refused() -> None:
    body = json.dumps({"messages": [], "tools": [{"type": "function"}]}).encode()
    client, application = ask(body, rules=replace(RULES, abilities=Abilities(calls=False)))
    assert (client.status, client.error["message"]) == (400, NO_CALLS)
    assert application.received == []


@pytest.mark.parametrize(
    ("backend", "length", "environment", "rules"),
    [
        ("guidance", 2_048, {}, Rules(1_000_000, True, True)),
        ("xgrammar", 131_072, {}, Rules(2_097_152, False, True)),
        ("guidance", 2_048, {"POMARIUM_MAX_REQUEST_CHARS": "77"}, Rules(77, True, True)),
    ],
)
def test_rules_are_the_engines(
    backend: str, length: int, environment: dict[str, str], rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(backend=backend, disable_any_whitespace=False),
        model_config=SimpleNamespace(
            max_model_len=length, hf_config=SimpleNamespace(model_type="llama"), is_multimodal_model=False
        ),
    )
    renderer = SimpleNamespace(renderer=SimpleNamespace(tokenizer=None), parser=None, chat_template=None)
    assert rules_of(SimpleNamespace(vllm_config=config, online_renderer=renderer)) == rules
