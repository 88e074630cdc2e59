"""`pomarium selftest`: does this machine, or a rack in stages, compute and serve the embedded model as it should?

    machine.rows --+
    sections, each in a process of its own --process.run--> Rows --Report--> printed as they come --> exit code

This process imports neither MLX nor vLLM and writes no file, so that it outlives what it reports. --stages compares the
engine over a rack instead (staged_selftest).
"""

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pomarium.cluster.cli.progress import log_file, quiet
from pomarium.cluster.rack import current
from pomarium.worker.errors import SettingsError
from pomarium.worker.selftest_rows import Verdict

if TYPE_CHECKING:
    from pomarium.cluster.selftest.report import Report

EXIT_FAILED = 1
WHERE = "To report it, open an issue in Pomarium's issue tracker and paste everything between the two lines of quotes."
FENCE = "```"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "selftest",
        help="test this machine's kernels, results and serving, and print a report to paste",
        description="On a GPU compiles every kernel by itself, holds its results against its definition and times the "
        "main ones; compares the embedded model's greedy tokens with mlx-lm's, through the worker alone and through "
        "vLLM's engine; serves it over HTTP. Prints a report to paste, row by row; exits 1 if a row failed. With "
        "--stages the engine, its workers and the links between Macs are what is compared.",
    )
    parser.add_argument("--no-serving", action="store_true", help="leave out the engine and the endpoint")
    parser.add_argument(
        "--stages", type=int, metavar="N", help="over N Macs of the rack, each with a part of the layers"
    )
    parser.add_argument("--share-macs", action="store_true", help="stages may share a Mac: all of them on this one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if no row failed, else 1. Raises PomariumError with --stages alone."""
    if args.stages is not None:
        return _staged(args.stages, args.share_macs)
    return _alone(os.environ, serving=not args.no_serving)


def _alone(environ: Mapping[str, str], serving: bool) -> int:
    from pomarium.cluster.selftest.report import Report

    report = Report()
    report.say(f"{FENCE}text\npomarium selftest")
    try:
        _sections(report, environ, serving)
    except KeyboardInterrupt:
        report.say(f"\ninterrupted\n{FENCE}")
        raise
    report.say(f"\n{report.summary()}\n{FENCE}\n{WHERE}")
    return EXIT_FAILED if report.failed else 0


def _sections(report: "Report", environ: Mapping[str, str], serving: bool) -> None:
    from pomarium.cluster.selftest import machine, process, sections
    from pomarium.cluster.selftest.process import Section

    report.section("machine", machine.rows(environ))
    device = report.section("device", process.run(Section(sections.DEVICE), environ))
    if any(row.failed for row in device):  # kernels have nothing to run on; the rest is tried without a GPU
        environ = process.cpu_only(environ)
    compiled = report.section(
        "kernels, each compiled by itself", process.run(Section(sections.COMPILE, resumes=True), environ)
    )
    if any(row.verdict is not Verdict.NOT_RUN for row in compiled):
        broken = [row.name for row in compiled if row.failed]
        checks = Section(sections.CHECK, broken, resumes=True)
        report.section("kernels against float64", process.run(checks, environ))
        report.section("times", process.run(Section(sections.TIME, resumes=True), environ))
    report.section("embedded model, the worker alone", process.run(Section(sections.MODEL), environ))
    if serving:
        report.section("embedded model, vLLM's engine", process.run(Section(sections.ENGINE), environ))
        report.section("embedded model, over HTTP", process.run(Section(sections.ENDPOINT), environ))


def _staged(stages: int, share_macs: bool) -> int:
    if stages < 1:
        raise SettingsError(f"--stages {stages} computes nothing: give at least 1.")
    if not share_macs:
        current.enter()
    with quiet(log_file("selftest")) as terminal:
        terminal.say(f"log      {terminal.log}")
        from pomarium.cluster.cli.staged_selftest import StagedEngine
        from pomarium.cluster.selftest.report import line
        from pomarium.worker import selftest

        with terminal.phase("engine"):
            engine = StagedEngine(stages, share_macs)
        try:
            report = selftest.run(engine.generate)
        finally:
            engine.close()
        terminal.say("\n".join(map(line, report.rows("stages"))))
        terminal.say(f"where    {engine.where}\nselftest: {'passed' if report.passed else 'FAILED'}")
    with terminal.log.open("ab") as log:
        os.dup2(log.fileno(), 2)  # what vLLM's libraries have to say when the interpreter ends
    return 0 if report.passed else EXIT_FAILED
