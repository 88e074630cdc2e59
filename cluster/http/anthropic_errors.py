"""Anthropic's error body in place of any other: vLLM refuses what it cannot read in OpenAI's, whatever the path.

application --http.response.start, .body of an error--> Retold --the same with {"type": "error", ...}--> send
"""

import json
from typing import Any

from pomarium.cluster.http.asgi import Message, Send, answer_json
from pomarium.cluster.http.protocols import anthropic_error


class Retold:
    """ASGI's `send` of a request to Anthropic's paths. What is no error passes as it comes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status: int | None = None
        self._pieces: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._status = message["status"]
        elif self._status is None:
            await self._send(message)
        else:
            self._pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                body = b"".join(self._pieces)
                await answer_json(self._send, self._status, anthropic_error(self._status, message_of(body)))


def message_of(body: bytes) -> str:
    """The sentence of an error's body, in OpenAI's form or Anthropic's; the body itself if it has neither."""
    try:
        fields: Any = json.loads(body)
    except ValueError:
        fields = None
    error = fields.get("error") if isinstance(fields, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else body.decode(errors="replace")
