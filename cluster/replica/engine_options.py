"""The words of the command line, looked over before vLLM is imported, which takes seconds: options that neither vLLM
nor we have, numbers that are none, and what Pomarium decides itself.

    vLLM's parsers --engine_args.options, `make engine-options`--> engine_options.json --known--> check(words)

What this lets through vLLM's own parser still judges (engine_args.parse). With another version of vLLM than the file's
unknown options are left to that.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from pomarium.worker.errors import SettingsError

FILE = Path(__file__).with_name("engine_options.json")

OURS = {
    "model": "name the model as the first argument of `pomarium serve`",
    "served_model_name": "use --served-name",
    "distributed_executor_backend": "Pomarium places the workers itself",
    "worker_cls": "Pomarium brings the worker",
    "pipeline_parallel_size": "use --stages",
}
"""Fields of vLLM's arguments that Pomarium decides, and what to do instead."""

BESIDE = frozenset({"--config"})
"""What vLLM's parser takes without an action of its own."""

NUMBERS = {"int": int, "float": float}


@dataclass(frozen=True)
class Option:
    """One of vLLM's arguments.

    Attributes:
        field: of AsyncEngineArgs or FrontendArgs. kind: "int", "float", or "" where only vLLM can judge a value.
        choices: what it may be; empty for whatever it is.
    """

    field: str
    kind: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """vLLM's version, and its options by each way to write them."""

    version: str
    options: Mapping[str, Option]


@cache
def known() -> Known:
    """What the file says."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    options = {
        word: Option(field, told.get("kind", ""), tuple(told.get("choices", ())))
        for field, told in data["options"].items()
        for word in told["words"]
    }
    return Known(data["version"], options)


def check(words: Sequence[str], own: Sequence[str] = (), vllm: str | None = None) -> None:
    """Look over `words`, from the first option on.

    Args:
        own: options of the command itself, which may have been meant.
        vllm: its version; None for the installed one.

    Raises:
        SettingsError: for the first word that is certainly wrong.
    """
    facts = known()
    for place, word in enumerate(words):
        if not re.match(r"--?[A-Za-z]", word):
            continue
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            head, dot, _ = name.partition(".")  # --compilation-config.mode 3: a part of a JSON value
            name = head.replace("_", "-")
        else:
            name, dot, _ = name.partition(".")
            if name.startswith("-O"):
                continue
        option = facts.options.get(name)
        if option is None:
            if name not in BESIDE and (vllm or version("vllm")).partition("+")[0] == facts.version:
                _refuse_unknown(name, [*own, *facts.options])
            continue
        if option.field in OURS:
            raise SettingsError(f"{name} cannot be given: {OURS[option.field]}.")
        if dot:
            continue
        if not has_value:
            value = words[place + 1] if place + 1 < len(words) else ""
        _check_value(name, option, value)


def _check_value(name: str, option: Option, value: str) -> None:
    if option.choices and value not in option.choices:
        raise SettingsError(f"{name} {value}: it may be {', '.join(option.choices)}.")
    if option.kind:
        try:
            NUMBERS[option.kind](value)
        except ValueError:
            raise SettingsError(f"{name} {value}: this is no {'whole ' * (option.kind == 'int')}number.") from None


def _refuse_unknown(name: str, options: Sequence[str]) -> NoReturn:
    meant = nearest(name, options)
    raise SettingsError(
        f"There is no option {name}{f': did you mean {meant}?' if meant else '.'} `pomarium serve --help` lists ours, "
        "`vllm serve --help=all` the engine's."
    )


def nearest(word: str, known_words: Sequence[str]) -> str | None:
    """The one of `known_words` that `word` was probably meant to be; None if it is like none of them."""
    if len(word) < len("--xx"):
        return None
    begun = sorted((one for one in known_words if one.startswith(word)), key=len)
    return next(iter([*begun, *difflib.get_close_matches(word, known_words, 1)]), None)
