"""`pomarium`: finds the subcommand, runs it, turns a PomariumError into one line on stderr and exit code 1.

A subcommand is a module with `add_parser(subparsers)`; its parser sets `run(args) -> int`. A parser that sets
`passes_through` gets the arguments that it does not know as `args.extra`. All of them are in `args.argv`, as they were
given, and the options of the command are `args.options`. Only the module asked for is imported.
"""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pomarium.cluster.machine import descriptors
from pomarium.cluster.provision import packages
from pomarium.cluster.replica import engine_options
from pomarium.worker.errors import PomariumError

COMMANDS = ("serve", "chat", "models", "batch", "plan", "rack", "env", "doctor", "selftest", "setup")

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and models need not be text that it can hold
        sys.stdout.reconfigure(errors="backslashreplace")
    descriptors.raise_limit()  # for all that it starts, too
    try:
        args = parse(arguments)
        engine_options.check(args.extra, args.options)
        return int(args.run(args))
    except PomariumError as e:
        print(f"pomarium: {' '.join(str(e).split())}", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        # One that passed through an exec of text, as of an import that makes a dataclass, has Python end itself by
        # SIGINT, caught or not (Python/pythonrun.c, unhandled_keyboard_interrupt), unless another exec follows.
        exec("")
        return EXIT_INTERRUPTED


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Exits as argparse does: 0 after --help and --version, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="pomarium",
        description="Serves large language models from Macs: vLLM's engine, Ray's scheduling, MLX workers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pomarium {version('pomarium')}")
    parser.set_defaults(passes_through=False, extra=[])
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = [c for c in COMMANDS if c in arguments[:1]] or COMMANDS
    if wanted != ["setup"] and (missing := packages.missing()):
        raise packages.SetupError(f"{missing[0]} is not installed here: `pomarium setup` installs what pomarium needs.")
    for command in wanted:
        importlib.import_module(f"pomarium.cluster.cli.{command}").add_parser(subparsers)
    args, extra = parser.parse_known_args(list(arguments))
    innermost = _innermost(parser, arguments)
    args.extra, args.argv, args.options = extra, list(arguments), _options(innermost)
    if extra and not args.passes_through:
        wrong = next((word for word in extra if word.startswith("--")), "")
        meant = engine_options.nearest(wrong.partition("=")[0], args.options) if wrong else None
        innermost.error(f"unrecognized arguments: {' '.join(extra)}{f' (did you mean {meant}?)' if meant else ''}")
    return args


def _innermost(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Of the command that `arguments` name."""
    for word in arguments:
        for action in parser._actions:  # argparse has no other way to tell what it was given
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
                break
    return parser


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """All options of a command."""
    return [word for action in parser._actions for word in action.option_strings]


if __name__ == "__main__":
    sys.exit(main())
