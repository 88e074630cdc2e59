"""vLLM's own engine and front-end arguments on our command line, checked by vLLM's own parser."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from pomarium.cluster.replica import engine_options
from pomarium.cluster.replica.engine_options import FILE, NUMBERS
from pomarium.worker.errors import SettingsError


def parse(tokens: Sequence[str]) -> dict[str, Any]:
    """The fields of vLLM's AsyncEngineArgs and FrontendArgs that `tokens` set, and no others.

    Imports vLLM (seconds) unless there is nothing to parse, or what there is cannot be right.

    Raises:
        SettingsError: for an unknown argument, a bad value, or an argument that Pomarium decides.
    """
    if not tokens:
        return {}
    engine_options.check(tokens)
    fields: dict[str, Any] = vars(_parser().parse_args(list(tokens)))
    for name, instead in engine_options.OURS.items():
        if name in fields:
            raise SettingsError(f"--{name.replace('_', '-')} cannot be given: {instead}.")
    return fields


def options() -> dict[str, Any]:
    """What engine_options.json holds: vLLM's version and, by field, the ways to write each option and what is known of
    its values. Imports vLLM."""
    import vllm

    found: dict[str, dict[str, Any]] = {}
    for action in _parser()._actions:
        told: dict[str, Any] = {"words": list(action.option_strings)}
        kind = getattr(action.type, "__name__", "")
        if kind in NUMBERS and action.nargs is None:
            told["kind"] = kind
        if action.choices is not None and action.nargs is None and all(isinstance(c, str) for c in action.choices):
            told["choices"] = sorted(action.choices)
        found[action.dest] = told
    return {"version": vllm.__version__, "options": dict(sorted(found.items()))}


def text(found: dict[str, Any]) -> str:
    """What `options` gave as the file has it: JSON, a line for each option."""
    lines = ",\n".join(f"  {json.dumps(field)}: {json.dumps(told)}" for field, told in found["options"].items())
    return f'{{\n "version": {json.dumps(found["version"])},\n "options": {{\n{lines}\n }}\n}}\n'


def _parser() -> Any:
    from argparse import SUPPRESS

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise SettingsError(f"{_capital(message)}. `vllm serve --help=all` lists the engine arguments.")

    parser = Parser(prog="pomarium serve", add_help=False, allow_abbrev=False)
    BaseFrontendArgs.add_cli_args(parser)
    AsyncEngineArgs.add_cli_args(parser)
    for action in parser._actions:  # argparse has no other way to tell a given value from a default
        action.default = SUPPRESS
    return parser


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    FILE.write_text(text(options()), encoding="utf-8")
