"""`pomarium chat` against an endpoint that computes nothing: what it sends, shows, and does with Ctrl-C."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from endpoint_stub import app_serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typed import CTRL_C, CTRL_D, Typed

from pomarium.cluster.cli import main as cli
from pomarium.cluster.cli.chat import Conversation, Speed, obey

DEADLINE_S = 240.0


@dataclass
class Endpoint:
    """Answers with what was said before and `answered`; to "wait" it begins and waits until the client leaves.

    Attributes:
        models: served. key: that requests must carry; empty for none. bodies: of what was asked. left: a client did.
    """

    models: list[str] = field(default_factory=lambda: ["tiny"])
    key: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    async def list(self, request: Request) -> Response:
        if self.key and request.headers["authorization"] != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no", "code": 401}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model"} for model in self.models]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        said = body["messages"][-1]["content"]
        if said == "refuse":
            return JSONResponse({"error": {"message": "That is too long.", "code": 400}}, 400)
        return StreamingResponse(self._events(said), media_type="text/event-stream")

    async def _events(self, said: str) -> AsyncIterator[str]:
        yield _event({"role": "assistant", "content": ""})
        if said == "think":
            yield _event({"reasoning": "first this"})
        yield _event({"content": f"you said {said}"})
        if said == "wait":
            try:
                while True:
                    await asyncio.sleep(0.1)
                    yield ": still here\n\n"
            finally:
                self.left.set()
        yield _event({"content": ", I heard"})
        usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
        yield f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def _event(delta: dict[str, str]) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    app = Starlette(routes=[
        Route("/v1/models", found.list), Route("/v1/chat/completions", found.chat, methods=["POST"])
    ])  # fmt: skip
    with app_serving(app) as url:
        found.url = url
        yield found


def piped(text: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pomarium.cluster.cli.main", "chat", *arguments]
    environ = {name: value for name, value in os.environ.items() if name != "POMARIUM_API_KEY"} | variables
    return subprocess.run(
        command, input=text, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_each_line_of_a_pipe_is_a_message_of_one_conversation(endpoint: Endpoint) -> None:
    done = piped("one\n\ntwo\n", "--url", endpoint.url, "--system", "be brief", "--max-tokens", "9")
    assert (done.returncode, done.stdout) == (0, "you said one, I heard\nyou said two, I heard\n")
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == ["7 tokens", "7 tokens"]
    assert endpoint.bodies[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "you said one, I heard"},
        {"role": "user", "content": "two"},
    ]
    assert (endpoint.bodies[0]["model"], endpoint.bodies[0]["max_tokens"]) == ("tiny", 9)
    assert "temperature" not in endpoint.bodies[0]


def test_thoughts_are_not_in_a_pipe(endpoint: Endpoint) -> None:
    assert piped("think\n", "--url", f"{endpoint.url}/v1").stdout == "you said think, I heard\n"


def test_a_refused_message_ends_a_pipe_with_the_endpoints_sentence(endpoint: Endpoint) -> None:
    done = piped("refuse\nnever asked\n", "--url", endpoint.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pomarium: That is too long.\n"
    assert len(endpoint.bodies) == 1


def test_a_key_is_sent(endpoint: Endpoint) -> None:
    endpoint.key = "k1"
    wanted = "pomarium: The endpoint wants a key: give it with --api-key, or set POMARIUM_API_KEY.\n"
    assert piped("a\n", "--url", endpoint.url).stderr == wanted
    assert piped("a\n", "--url", endpoint.url, "--api-key", "k1").returncode == 0
    assert piped("a\n", "--url", endpoint.url, POMARIUM_API_KEY="k1").returncode == 0


def test_which_model(endpoint: Endpoint) -> None:
    endpoint.models = ["a", "b"]
    assert "serves a, b: name one of them" in piped("x\n", "--url", endpoint.url).stderr
    assert "No model is called 'c'" in piped("x\n", "c", "--url", endpoint.url).stderr
    assert piped("x\n", "b", "--url", endpoint.url).returncode == 0
    assert endpoint.bodies[0]["model"] == "b"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:9", "Nothing answers at http://127.0.0.1:9: start `pomarium serve`, or name a running"),
        ("127.0.0.1:8000", "--url '127.0.0.1:8000' is no address of an endpoint"),
        ("ftp://a", "--url 'ftp://a' is no address of an endpoint"),
    ],
)
def test_where_nothing_answers(url: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--url", url]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert sentence in err


def test_a_conversation_at_a_terminal(endpoint: Endpoint) -> None:
    with Typed(["chat", "--url", endpoint.url], os.environ) as typed:
        assert f"tiny at {endpoint.url}; /help lists the commands" in typed.until("> ")
        typed.type("think\n")
        shown = typed.until("> ")
        assert "first this" in shown
        assert "you said think, I heard" in shown
        assert "7 tokens" in shown

        typed.type("wait\n")
        typed.until("you said wait")
        typed.type(CTRL_C)
        assert "stopped" in typed.until("> ")
        assert endpoint.left.wait(DEADLINE_S)

        typed.type("refuse\n")
        assert "That is too long." in typed.until("> ")
        typed.type("/nothing\n")
        assert "/nothing is no command: /system, /reset, /exit, /help are." in typed.until("> ")
        typed.type("/system be kind\n")
        typed.until("> ")
        typed.type("more\n")
        typed.until("tokens")
        typed.until("> ")
        assert [message["content"] for message in endpoint.bodies[-1]["messages"]] == [
            "be kind", "think", "you said think, I heard", "wait", "you said wait", "more",
        ]  # fmt: skip
        typed.type("/reset\n")
        typed.until("> ")
        typed.type("again\n")
        typed.until("tokens")
        assert [message["content"] for message in endpoint.bodies[-1]["messages"]] == ["be kind", "again"]
        typed.until("> ")
        typed.type("/exit\n")
        assert typed.ended() == 0


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D])
def test_the_prompt_is_left_by(key: str, endpoint: Endpoint) -> None:
    with Typed(["chat", "--url", endpoint.url], os.environ) as typed:
        typed.until("> ")
        assert typed.ended(key) == 0


def test_commands_change_the_conversation() -> None:
    talk = Conversation("old", [("user", "a")])
    assert obey("/system  new one ", talk)
    assert talk.system == "new one"
    assert obey("/reset", talk)
    assert talk.messages() == [{"role": "system", "content": "new one"}]
    assert obey("/system", talk)
    assert talk.messages() == []
    assert not obey("/exit", talk)


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (Speed(11, 1.0, 3.0), "11 tokens, 5.0 tokens/s, the first after 1.0 s"),
        (Speed(1, 1.0, 1.0), "1 tokens, the first after 1.0 s"),
        (Speed(None, 1.0, 2.5), "2.5 s"),
    ],
)
def test_the_speed_is_that_of_the_tokens_after_the_first(speed: Speed, text: str) -> None:
    assert str(speed) == text
