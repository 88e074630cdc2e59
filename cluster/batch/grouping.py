"""In which order requests are asked: those whose prompts begin alike one after another, so that caches are used.

    requests in the order of IN --grouped, a window at a time--> the same requests, sorted by their prompts

A cache holds what was computed of late. Prompts that share a system message or a document and lie far apart in IN would
each compute it anew; within a window they stand together. What is held in memory is one window.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice

from pomarium.cluster.batch.lines import Request
from pomarium.cluster.http.prompts import prompt_text

WINDOW = 4096
WINDOW_BYTES = 64 << 20
"""A window ends at so many requests, or bytes of them."""


def grouped(requests: Iterable[Request], window: int = WINDOW, most_bytes: int = WINDOW_BYTES) -> Iterator[Request]:
    """All of `requests`, window by window."""
    source = iter(requests)
    while held := _window(source, window, most_bytes):
        yield from sorted(held, key=lambda request: (request.url, prompt_of(request)))


def prompt_of(request: Request) -> str:
    """What stands before the answer, in the order in which the engine sees it."""
    return prompt_text(json.loads(request.body))


def _window(source: Iterator[Request], window: int, most_bytes: int) -> list[Request]:
    held, size = [], 0
    for request in islice(source, window):
        held.append(request)
        size += len(request.body)
        if size >= most_bytes:
            break
    return held
