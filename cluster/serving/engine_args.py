"""vLLM's own engine and front-end arguments on our command line, checked by vLLM's own parser."""

from collections.abc import Sequence
from typing import Any, NoReturn

from pomarium.worker.errors import SettingsError

OURS = {
    "model": "name the model as the first argument of `pomarium serve`",
    "served_model_name": "use --served-name",
    "distributed_executor_backend": "Pomarium places the workers itself",
    "worker_cls": "Pomarium brings the worker",
    "pipeline_parallel_size": "use --stages",
}
"""Fields of vLLM's arguments that Pomarium decides, and what to do instead."""


def parse(tokens: Sequence[str]) -> dict[str, Any]:
    """The fields of vLLM's AsyncEngineArgs and FrontendArgs that `tokens` set, and no others.

    Imports vLLM (seconds) unless there is nothing to parse.

    Raises:
        SettingsError: for an unknown argument, a bad value, or an argument that Pomarium decides.
    """
    if not tokens:
        return {}
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
    fields: dict[str, Any] = vars(parser.parse_args(list(tokens)))
    for name, instead in OURS.items():
        if name in fields:
            raise SettingsError(f"--{name.replace('_', '-')} cannot be given: {instead}.")
    return fields


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
