"""Stands before vLLM's OpenAI application and refuses what would raise in it, hold its event loop or its compilers.

    request --Guard: bodies.parsed, texts, kinds, calls, conversations, responses, constraints, grammars (in a
               thread)--> 400,
               or the application as if alone

An ASGI middleware, since the application's own checks run on the event loop that streams and heartbeats share, and
after others have read the body and walked through it. `pomarium serve` and `vllm serve` have it by default
(llm_server.py, platform.py). Only what is bounded is compiled, one after another, and nothing for who has left.
"""

import asyncio
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pomarium.cluster.engine.intake import calls, constraints, conversations, kinds, pictures, responses, texts
from pomarium.cluster.engine.intake.constraints import Constraint
from pomarium.cluster.engine.intake.conversations import Abilities
from pomarium.cluster.http import bodies, openai_errors, protocols
from pomarium.cluster.http.anthropic_errors import Retold
from pomarium.cluster.http.asgi import App, Message, Receive, Send, answer_json
from pomarium.worker import settings

PATH = f"{__name__}.Guard"
"""What vLLM's --middleware takes."""


@dataclass(frozen=True)
class Rules:
    """What depends on the engine.

    Attributes:
        chars: of one request, at most. compiles: constraints are tried on llguidance, the engine's own compiler.
        abilities: what requests in messages may ask for. sees: they may show images.
    """

    chars: int
    compiles: bool
    any_whitespace: bool = True
    abilities: Abilities = conversations.ALL
    sees: bool = False


class Guard:
    """ASGI middleware. Takes its rules from vLLM's application state, or those given."""

    def __init__(self, app: App, rules: Rules | None = None) -> None:
        self._app = app
        self._rules = rules
        self._compiler = ThreadPoolExecutor(1, "constraints")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers 400, or has the application answer. Looks no further once the client has left."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if protocols.is_anthropic(path):
            send = Retold(send)
        if not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        if self._rules is None:
            self._rules = rules_of(scope["app"].state)
        ahead = asyncio.ensure_future(receive())
        judging = asyncio.ensure_future(self._refusal(self._rules, path, body))
        try:
            await asyncio.wait({ahead, judging}, return_when=asyncio.FIRST_COMPLETED)
            if not judging.done():
                return
            if refusal := judging.result():
                await answer_json(send, *openai_errors.invalid(refusal, None))
                return
            replayed = _Replayed(body, ahead, receive)
            del body  # an answer may take minutes
            await self._app(scope, replayed, send)
        finally:
            judging.cancel()
            ahead.cancel()

    async def _refusal(self, rules: Rules, path: str, body: bytes) -> str | None:
        if not body:
            return None
        try:
            large = len(body) > bodies.LARGE
            fields = await asyncio.to_thread(bodies.parsed, body) if large else bodies.parsed(body)
        except bodies.BodyError as error:
            return str(error)
        shown = pictures.chars_of(fields) if rules.sees else 0
        if refusal := texts.refusal(fields, rules.chars, len(body), shown):
            return refusal
        if refusal := kinds.refusal(fields) or calls.refusal(fields):
            return refusal
        if path == protocols.RESPONSES and (refusal := responses.refusal(fields)):
            return refusal
        if refusal := conversations.refusal(path, fields, rules.abilities):
            return refusal
        found = constraints.of_body(fields)
        for constraint in found:
            if refusal := constraints.refusal(constraint):
                return refusal
        for constraint in found if rules.compiles else ():
            if refusal := await self._fault(constraint, rules):
                return refusal
        return None

    async def _fault(self, constraint: Constraint, rules: Rules) -> str | None:
        from pomarium.cluster.engine.intake import grammars

        asked = functools.partial(grammars.fault, constraint, any_whitespace=rules.any_whitespace)
        return await asyncio.get_running_loop().run_in_executor(self._compiler, asked)


def rules_of(state: Any) -> Rules:
    """The rules for the engine of vLLM's application `state`, configured as the platform completed it. Raises
    SettingsError."""
    outputs, model = state.vllm_config.structured_outputs_config, state.vllm_config.model_config
    chars = settings.load(os.environ).max_request_chars or texts.limit_of(model.max_model_len)
    own_form = model.hf_config.model_type == "gpt_oss"
    abilities = conversations.abilities_of(state.online_renderer, own_form)
    return Rules(
        chars, outputs.backend == "guidance", not outputs.disable_any_whitespace, abilities, model.is_multimodal_model
    )


class _Replayed:
    """`receive` of a request whose body was read already, and perhaps one message more."""

    def __init__(self, body: bytes, ahead: "asyncio.Future[Message]", receive: Receive) -> None:
        self._body: bytes | None = body
        self._ahead: asyncio.Future[Message] | None = ahead
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._ahead is not None:
            # Whoever gives up waiting asks again, and the message that was waited for is still his.
            message = await asyncio.shield(self._ahead)
            self._ahead = None
            return message
        return await self._receive()


def _is_json(scope: Message) -> bool:
    kind = next((value for key, value in scope["headers"] if key.lower() == b"content-type"), b"")
    media_type = bytes(kind).split(b";")[0].strip().lower()
    return media_type in (b"application/json", b"") or media_type.endswith(b"+json")


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client left before its end."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)
