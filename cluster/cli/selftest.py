"""`pomarium selftest`: does this machine compute the embedded model as mlx-lm does? Prints a report to paste."""

import argparse

EXIT_FAILED = 1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "selftest",
        help="compare this machine's results with mlx-lm's",
        description="Computes the embedded model on this machine's device through the worker's own path (rows, paged "
        "cache, sampler) and through mlx-lm's, compares the greedy tokens and prints a short report to paste.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if all tokens agree, near ties aside; 1 otherwise. Raises PomariumError."""
    from pomarium.worker import selftest

    report = selftest.run()
    print(report.text())
    return 0 if report.passed else EXIT_FAILED
