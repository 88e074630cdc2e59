"""`pomarium selftest`: does this machine, or a rack in stages, compute the embedded model as mlx-lm does?

worker.selftest.run --this machine's worker, or staged_selftest: vllm.LLM over several Macs--> Report, to paste
worker.selftest_kernels.run --every kernel on this machine's GPU--> KernelReport, to paste
"""

import argparse
import os

from pomarium.cluster.cli.progress import log_file, quiet
from pomarium.cluster.rack import current
from pomarium.worker.errors import SettingsError

EXIT_FAILED = 1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "selftest",
        help="compare this machine's results with mlx-lm's",
        description="Computes the embedded model on this machine's device through the worker's own path (rows, paged "
        "cache, sampler) and through mlx-lm's, compares the greedy tokens and prints a short report to paste. On a GPU "
        "also runs every kernel on small inputs against its definition, and times the main ones. With --stages the "
        "engine, its workers and the links between Macs are what is compared.",
    )
    parser.add_argument(
        "--stages", type=int, metavar="N", help="over N Macs of the rack, each with a part of the layers"
    )
    parser.add_argument("--share-macs", action="store_true", help="stages may share a Mac: all of them on this one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if all tokens agree, near ties aside, and all kernels are right, else 1. Raises PomariumError."""
    from pomarium.worker import selftest, selftest_kernels

    if args.stages is not None:
        return _staged(args.stages, args.share_macs)
    report = selftest.run()
    print(report.text(), flush=True)
    kernels = selftest_kernels.run()
    if kernels is None:
        print("  kernels   not run: there is no GPU here, attention runs as MLX operations")
        return 0 if report.passed else EXIT_FAILED
    print(f"\n{kernels.text()}")
    return 0 if report.passed and kernels.passed else EXIT_FAILED


def _staged(stages: int, share_macs: bool) -> int:
    if stages < 1:
        raise SettingsError(f"--stages {stages} computes nothing: give at least 1.")
    if not share_macs:
        current.enter()
    with quiet(log_file("selftest")) as terminal:
        terminal.say(f"log      {terminal.log}")
        from pomarium.cluster.cli.staged_selftest import StagedEngine
        from pomarium.worker import selftest

        with terminal.phase("engine"):
            engine = StagedEngine(stages, share_macs)
        try:
            report = selftest.run(engine.generate)
        finally:
            engine.close()
        terminal.say(f"{report.text()}\n  stages    {engine.where}")
    with terminal.log.open("ab") as log:
        os.dup2(log.fileno(), 2)  # what vLLM's libraries have to say when the interpreter ends
    return 0 if report.passed else EXIT_FAILED
