"""`pomarium chat`: a conversation in the terminal, or line by line from a pipe, with a model of an endpoint.

    --url, or one that runs where `pomarium serve` listens, or one of its own (own_endpoint.py) --> the model

    line --command_of--> a command: the conversation changes, or ends
         `-- else -----> Conversation.messages --openai's client, streamed--> answer on stdout, its speed on stderr

Answers alone go to stdout, so that a pipe has nothing else. Ctrl-C ends the answer that is being written, whose request
the endpoint then gives up; where nothing is being written it ends the chat, and so does the end of input.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pomarium.cluster.cli import own_endpoint
from pomarium.cluster.cli.serve_options import KEY_VARIABLE
from pomarium.cluster.machine import listening
from pomarium.worker.address import is_local
from pomarium.worker.errors import PomariumError, SettingsError

if TYPE_CHECKING:
    from openai import OpenAI, Stream
    from openai.types.chat import ChatCompletionChunk

URL = "http://127.0.0.1:8000"
"""Where `pomarium serve` listens."""
PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONNECT_S, SILENCE_S = 10.0, 3600.0
"""How long a connection may take, and an endpoint may be silent: one whose Macs sleep holds a request."""

COMMANDS = {
    "/system": "say how the model is to answer (without a text: forget it); the conversation goes on",
    "/reset": "begin anew, with the same /system",
    "/exit": "end the chat; Ctrl-D does, too",
    "/help": "these lines",
}


class ChatError(PomariumError):
    """The endpoint cannot be asked, or refuses; says why."""


@dataclass
class Conversation:
    """What was said.

    Attributes:
        system: how the model is to answer; empty: nothing was said. turns: (role, text), in order.
    """

    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """As OpenAI's protocol has them."""
        first = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in [*first, *self.turns]]


@dataclass(frozen=True)
class Speed:
    """Of one answer. tokens: of it, thoughts included; None: the endpoint did not tell. Times in seconds."""

    tokens: int | None
    first_s: float
    whole_s: float

    def __str__(self) -> str:
        if self.tokens is None:
            return f"{self.whole_s:.1f} s"
        writing_s = self.whole_s - self.first_s
        rate = f", {(self.tokens - 1) / writing_s:.1f} tokens/s" if self.tokens > 1 and writing_s > 0 else ""
        return f"{self.tokens} tokens{rate}, the first after {self.first_s:.1f} s"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `chat` to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model of a running endpoint, or of one for this chat",
        description="Talks with a model that `pomarium serve`, or another endpoint of OpenAI's protocol, serves. Where "
        "nothing listens yet it starts `pomarium serve` for this chat. From a pipe each line is a message.",
        epilog="In the chat: " + "; ".join(f"{name} {what}" for name, what in COMMANDS.items()) + ". Ctrl-C ends an "
        "answer, and at the prompt the chat.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="its name at the endpoint (default: the only one); for an endpoint that is started, as `pomarium serve` "
        "takes it",
    )
    parser.add_argument("--url", help=f"the endpoint, with or without /v1 (default: {URL}, or one for this chat)")
    parser.add_argument("--api-key", metavar="KEY", help=f"a key that it wants (default: {KEY_VARIABLE})")
    parser.add_argument("--system", default="", metavar="TEXT", help="how the model is to answer")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: what fits)")
    parser.add_argument("--temperature", type=float, metavar="T", help="how freely it answers (default: the model's)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves: 0. Raises ChatError, SettingsError, OwnEndpointError."""
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    if args.url is not None or not listening.is_free(own_endpoint.HOST, urlsplit(URL).port or 0):
        return _talk(args, args.url or URL, key, args.model)
    _tell(f"Nothing answers at {URL}: an endpoint is started for this chat. `pomarium serve` starts one that stays.")
    environ = {**os.environ, **({KEY_VARIABLE: key} if key else {})}
    with own_endpoint.started(args.model, environ) as url:
        return _talk(args, url, key, None)


def _talk(args: argparse.Namespace, url: str, key: str | None, name: str | None) -> int:
    """With the model `name` of the endpoint at `url`, or with its only one."""
    client = client_of(url, key)
    model = _model(client, name, url)
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    chat = _Chat(client, model, {name: value for name, value in options.items() if value is not None})
    talk = Conversation(args.system)
    if chat.live:
        _tell(f"{model} at {url}; /help lists the commands")
    for line in _lines(chat.live):
        if line.startswith("/"):
            if not obey(line, talk):
                break
        elif line.strip():
            chat.answer(talk, line)
    return 0


def obey(line: str, talk: Conversation) -> bool:
    """Do what a command says: whether the chat goes on."""
    word, _, rest = line.partition(" ")
    if word == "/exit":
        return False
    if word == "/system":
        talk.system = rest.strip()
    elif word == "/reset":
        talk.turns.clear()
    elif word == "/help":
        _tell("\n".join(f"{name:<8} {what}" for name, what in COMMANDS.items()))
    else:
        _tell(f"{word} is no command: {', '.join(COMMANDS)} are.")
    return True


class _Chat:
    """Asks one model, and writes what it answers."""

    def __init__(self, client: "OpenAI", model: str, options: dict[str, Any]) -> None:
        self._client, self._model, self._options = client, model, options
        self.live = sys.stdin.isatty() and sys.stdout.isatty()

    def answer(self, talk: Conversation, line: str) -> None:
        """Ask, write the answer as it comes, and keep both. Ctrl-C ends it early. Raises ChatError from a pipe."""
        from openai import APIError

        talk.turns.append(("user", line))
        began = time.monotonic()
        pieces: list[str] = []
        try:
            speed = self._write(talk, began, pieces)
        except KeyboardInterrupt:
            if not self.live:
                raise
            speed = None
        except APIError as error:
            talk.turns.pop()
            if pieces or self.live:
                print(flush=True)
            if not self.live:
                raise ChatError(sentence_of(error)) from None
            _tell(sentence_of(error))
            return
        print(PLAIN if self.live else "", flush=True)  # an answer that ends in its thoughts leaves them dim
        _tell("stopped" if speed is None else str(speed))
        if pieces:
            talk.turns.append(("assistant", "".join(pieces)))
        else:
            talk.turns.pop()

    def _write(self, talk: Conversation, began: float, pieces: list[str]) -> Speed:
        """Add to `pieces` what is written. Leaving it, however, closes the stream, so that the endpoint gives it up."""
        first_s, tokens, thinking = None, None, False
        messages: Any = talk.messages()
        stream: Stream[ChatCompletionChunk] = self._client.chat.completions.create(
            model=self._model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **self._options,
        )
        with stream:
            for chunk in stream:
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    thought, text = (choice.delta.model_extra or {}).get("reasoning"), choice.delta.content
                    if first_s is None and (thought or text):
                        first_s = time.monotonic() - began
                    if thought and self.live:
                        print(f"{'' if thinking else DIM}{thought}", end="", flush=True)
                        thinking = True
                    if text:
                        pieces.append(text)  # first, for Ctrl-C may come as soon as it is seen
                        print(f"{f'{PLAIN}{chr(10)}' if thinking else ''}{text}", end="", flush=True)
                        thinking = False
        whole_s = time.monotonic() - began
        return Speed(tokens, whole_s if first_s is None else first_s, whole_s)


def _lines(live: bool) -> Iterator[str]:
    """What the user says, until the end of input or Ctrl-C at the prompt."""
    if not live:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")  # `input` then has a history, and keys to edit with
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def _tell(text: str) -> None:
    """What is no answer."""
    shown = f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text
    print(shown, file=sys.stderr, flush=True)


def client_of(url: str, key: str | None) -> "OpenAI":
    """Of the endpoint at `url`. A proxy of the environment is not asked for one in the local network.

    Raises:
        SettingsError: `url` is none.
    """
    import httpx2
    from openai import DefaultHttpxClient, OpenAI

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"--url {url!r} is no address of an endpoint: write it as {URL}.")
    base = f"{url.rstrip('/').removesuffix('/v1')}/v1"
    timeout = httpx2.Timeout(SILENCE_S, connect=CONNECT_S)
    transport = httpx2.HTTPTransport() if is_local(parts.hostname) else None
    http = DefaultHttpxClient(transport=transport, timeout=timeout)
    return OpenAI(base_url=base, api_key=key or "none", max_retries=0, timeout=timeout, http_client=http)


def _model(client: "OpenAI", name: str | None, url: str) -> str:
    """The model to talk with. Raises ChatError: nothing answers, or there is no such model."""
    from openai import APIConnectionError, APIError

    try:
        served = [model.id for model in client.models.list()]
    except APIConnectionError:
        raise ChatError(
            f"Nothing answers at {url}: start `pomarium serve`, or name a running endpoint with --url."
        ) from None
    except APIError as error:
        raise ChatError(sentence_of(error)) from None
    if name is None and len(served) == 1:
        return served[0]
    if name is None or name not in served:
        told = "" if name is None else f"No model is called {name!r} at {url}; "
        raise ChatError(f"{told}{url} serves {', '.join(served) or 'no model'}: name one of them.")
    return name


def sentence_of(error: Any) -> str:
    """What the endpoint says of a request that it refuses, or that the connection broke. error: of openai's client."""
    from openai import APIStatusError, AuthenticationError

    if isinstance(error, AuthenticationError):
        return f"The endpoint wants a key: give it with --api-key, or set {KEY_VARIABLE}."
    body = error.body if isinstance(error, APIStatusError) else None
    if isinstance(body, dict) and body.get("message"):
        return str(body["message"])
    return f"The endpoint does not answer: {error}"
