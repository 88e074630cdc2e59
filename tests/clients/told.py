"""What the client programs of this folder have in common: they are told where to ask, and print what each step gave.

PROGRAM URL KEY MODEL --> a line of JSON per step; then, with a stream just left, alive until their input ends
"""

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

URL, KEY, MODEL = sys.argv[1:4]

QUESTION = "What is the capital of France?"
STORY = "Write a long story."
ENDLESS = 900
"""Tokens of an answer that nobody reads to its end."""
TIMEOUT_S = 180


class City(BaseModel):
    """A form of an answer."""

    city: Literal["Paris", "Rome"]


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "description": "The weather in a city", "parameters": SCHEMA}
ASKED, WEATHER = "Weather in Paris?", "Sunny, 21 degrees."


def run(**steps: Callable[[], Any]) -> None:
    """Take the steps in order."""
    for name, step in steps.items():
        print(json.dumps({"step": name, "got": step()}), flush=True)
    sys.stdin.read()
