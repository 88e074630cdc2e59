"""A streamed completion on a thread of its own, as a client meets it while faults are planted."""

import json
import threading
import time
from typing import Any

import httpx


class Stream(threading.Thread):
    """One streamed completion of so many tokens.

    Attributes:
        begun: set with the first event. last: the last event before the end, which tells the usage or an error.
        ended: when it did, by time.monotonic. fault: what the connection ended with, if not in order.
    """

    def __init__(self, url: str, prompt: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self._url, self._prompt, self._tokens = url, prompt, tokens
        self.begun = threading.Event()
        self.ended = 0.0
        self.last: dict[str, Any] = {}
        self.fault: Exception | None = None

    def run(self) -> None:
        body = {
            "prompt": self._prompt,
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=300) as answer:
                if answer.status_code != 200:
                    self.last = json.loads(answer.read())
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.last = json.loads(line.removeprefix("data: "))
                        self.begun.set()
        except httpx.HTTPError as error:
            self.fault = error
        self.ended = time.monotonic()

    @property
    def whole(self) -> bool:
        """Whether it has all tokens that were asked for."""
        return (self.last.get("usage") or {}).get("completion_tokens") == self._tokens
