"""`pomarium batch`: many requests from a file, answered into a file, by engines of its own or by a running endpoint.

run     IN OUT   here, until all is answered        (`ray job submit -- python -m pomarium.cluster.batch IN OUT`)
submit  IN OUT   the same as a job of the rack's head: it goes on when this terminal is closed
status, logs, cancel JOB
"""

import argparse
import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from pomarium.cluster.cli.interrupts import Interrupts, phases
from pomarium.cluster.cli.progress import Terminal, log_file, quiet
from pomarium.cluster.provision import platform_choice
from pomarium.cluster.rack import current
from pomarium.worker import settings
from pomarium.worker.errors import SettingsError

if TYPE_CHECKING:
    from pomarium.cluster.batch.dispatch import Engine
    from pomarium.cluster.batch.job import Files, Job
    from pomarium.cluster.batch.progress import Series, Tally

EXIT_INTERRUPTED = 130
PLAIN_S = 10.0
"""How often progress is told where there is no terminal to show a bar on."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands."""
    parser = subparsers.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answers the requests in IN, lines of OpenAI's batch format (custom_id, method, url, body), into "
        "OUT, and those that cannot be answered into ERRORS. Files are paths or whatever fsspec opens; names ending "
        "in .gz are gzip. A job that was cut off goes on with --resume.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text in (
        ("run", run_here, "answer it here: on the rack that is up on this machine, or on this machine alone"),
        ("submit", run_submit, "have the rack's head answer it; prints the job's name"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        _add_job(command)
        command.set_defaults(run=run, passes_through=True)
    command = commands.add_parser("status", help="what became of a job, or of all")
    command.add_argument("job", nargs="?", metavar="JOB")
    command.set_defaults(run=run_status)
    for name, run, text in (
        ("logs", run_logs, "what a job has said; with --follow until it ends"),
        ("cancel", run_cancel, "end a job; what it has answered stays, and --resume goes on"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", metavar="JOB")
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="until the job ends")
        command.set_defaults(run=run)


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="requests, one JSON object per line")
    parser.add_argument("out", metavar="OUT", help="results, as they come")
    parser.add_argument(
        "--errors", metavar="FILE", help="refused lines (default: out.errors.jsonl beside an OUT out.jsonl)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what OUT and ERRORS hold")
    parser.add_argument("--overwrite", action="store_true", help="drop what OUT and ERRORS hold")
    parser.add_argument("--model", metavar="MODEL", help="folder, GGUF file or id (default: the embedded model)")
    parser.add_argument("--served-name", metavar="NAME", help="the model's name in the requests' bodies")
    parser.add_argument("--endpoint", metavar="URL", help="ask a running endpoint instead of engines of the job's own")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at once with --endpoint (default: 64)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="engines (default: %(default)s)")
    parser.add_argument("--stages", metavar="N", help="Macs per engine, or auto (default: auto on a rack, else 1)")
    parser.add_argument("--share-macs", action="store_true", help="stages of one engine may share a Mac")
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt plus answer")


def run_here(args: argparse.Namespace) -> int:
    """`batch run`: 0 once every line has its answer. Raises PomariumError."""
    from pomarium.cluster.batch.job import Files

    job = job_of(args)
    with quiet(log_file("batch")) as terminal, Files.open(job) as files:
        terminal.say(f"log      {terminal.log}")
        with Interrupts(lambda: terminal.say("stopping ...")) as interrupts:
            try:
                _answer(args, job, files, terminal, interrupts)
            except KeyboardInterrupt:
                files.flush()
                terminal.say("stopped; what is answered is kept, and --resume goes on")
                return EXIT_INTERRUPTED
    return 0


def job_of(args: argparse.Namespace) -> "Job":
    """The files that the arguments name. Raises SettingsError for arguments that exclude each other."""
    from pomarium.cluster.batch.job import Job
    from pomarium.cluster.batch.output import errors_beside

    if args.extra and not args.extra[0].startswith("-"):
        raise SettingsError(f"{args.extra[0]!r} is one file too many: give IN and OUT, and a model with --model.")
    if args.resume and args.overwrite:
        raise SettingsError("--resume keeps earlier results and --overwrite drops them: give one.")
    if args.endpoint:
        given = {"--model": args.model, "--stages": args.stages, "--share-macs": args.share_macs or None}
        if unfit := [option for option, value in given.items() if value is not None] or args.extra:
            raise SettingsError(f"{unfit[0]} is for engines of the job's own: leave it or --endpoint out.")
    elif args.concurrency is not None:
        raise SettingsError("--concurrency is for --endpoint; with engines of the job's own --max-num-seqs is.")
    if args.concurrency is not None and args.concurrency < 1:
        raise SettingsError(f"--concurrency {args.concurrency} asks nothing: give at least 1.")
    if args.replicas < 1:
        raise SettingsError(f"--replicas {args.replicas} answers nothing: give at least 1.")
    return Job(args.source, args.out, args.errors or errors_beside(args.out), args.resume, args.overwrite)


def _answer(args: argparse.Namespace, job: "Job", files: "Files", terminal: Terminal, interrupts: Interrupts) -> None:
    from pomarium.cluster.batch.progress import Tally

    tally = Tally()
    if files.before >= files.total:
        terminal.say(f"all {files.total} lines of {job.source} have their answers")
        return
    if args.endpoint:
        _ask_endpoint(args, files, tally, terminal)
    else:
        _ask_engines(args, files, tally, terminal, interrupts)
    files.flush()
    terminal.say(tally.summary(job.out, job.errors, files.before))


def _ask_endpoint(args: argparse.Namespace, files: "Files", tally: "Tally", terminal: Terminal) -> None:
    from pomarium.cluster.batch.http_engine import ROOM, HttpEngine
    from pomarium.cluster.cli.serve_options import KEY_VARIABLE

    async def ask() -> None:
        engine = HttpEngine(args.endpoint, os.environ.get(KEY_VARIABLE), args.concurrency or ROOM)
        try:
            await _run(files, [engine], tally, terminal)
        finally:
            await engine.close()

    asyncio.run(ask())


def _ask_engines(
    args: argparse.Namespace, files: "Files", tally: "Tally", terminal: Terminal, interrupts: Interrupts
) -> None:
    from pomarium.cluster.cli.serve import fetch, models_of
    from pomarium.cluster.endpoint import beforehand, lifecycle
    from pomarium.cluster.replica.model_check import Check
    from pomarium.cluster.replica.serve_plan import ServePlan

    if not os.environ.get("RAY_ADDRESS"):  # a job of the rack's head has it
        current.enter()
    settings.load(os.environ)
    platform_choice.require()
    (model,) = models_of(_serve_arguments(args), os.environ)
    beforehand.check([model], os.environ)
    fetch([model], terminal, os.environ)
    joined = bool(os.environ.get("RAY_ADDRESS"))
    check = Check([model.source])

    phase = phases(terminal, interrupts, own_ray=not joined)
    try:
        with interrupts.held(), lifecycle.ray_running(ServePlan((model,)), phase, os.environ):
            with phase("model"):
                (found,) = check.found()
            # Not before: Ray reads how to authenticate when it is imported.
            from pomarium.cluster.batch.actor import RayEngine
            from pomarium.cluster.batch.progress import Series
            from pomarium.cluster.endpoint import app
            from pomarium.cluster.replica import patience

            name = f"batch-{secrets.token_hex(4)}"
            variables = app.passed_environment(os.environ) if joined else {}
            engines = [RayEngine(model, found, name, index, variables) for index in range(model.replicas)]
            try:
                with interrupts.raising():
                    asyncio.run(_run(files, engines, tally, terminal, Series(name)))
            finally:
                patience.starts(name)
    finally:
        check.abandon()


async def _run(
    files: "Files", engines: "Sequence[Engine]", tally: "Tally", terminal: Terminal, series: "Series | None" = None
) -> None:
    """Answer all: a phase until an engine is ready, then a bar."""
    from tqdm import tqdm

    from pomarium.cluster.batch import job

    live = terminal.out.isatty()
    with ExitStack() as stack:
        phase = ExitStack()
        phase.enter_context(terminal.phase("engine"))
        stack.push(phase.__exit__)
        bars: list[tqdm[NoReturn]] = []

        def ready() -> None:
            phase.close()
            tally.began = time.monotonic()
            bar = tqdm(total=files.total, initial=files.before, unit=" lines", file=terminal.out, dynamic_ncols=live,
                       mininterval=0.2 if live else PLAIN_S)  # fmt: skip
            bars.append(stack.enter_context(bar))

        def moved() -> None:
            (bar,) = bars
            bar.set_postfix_str(tally.postfix, refresh=False)
            bar.update()
            if series is not None:
                series.tell(tally)

        await job.run(files, engines, tally, ready, moved)


def _serve_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """What `pomarium serve` would be given for the same engines."""
    extra = [*([args.model] if args.model else []), *args.extra, "--enable-prompt-tokens-details"]
    return argparse.Namespace(
        extra=extra, max_model_len=args.max_model_len, replicas=str(args.replicas), keep=None, stages=args.stages,
        share_macs=args.share_macs, rack=None, models=None, on_demand=False,
        served_name=[args.served_name] if args.served_name else [],
    )  # fmt: skip


def run_submit(args: argparse.Namespace) -> int:
    """`batch submit`: 0 once the job is accepted. Raises PomariumError."""
    from pomarium.cluster.batch import ray_jobs

    job_of(args)
    name = ray_jobs.submit(args.argv[args.argv.index("submit") + 1 :])
    print(f"{name}\nfollow it with `pomarium batch logs --follow {name}`")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """`batch status`: 0. Raises PomariumError."""
    from pomarium.cluster.batch import ray_jobs

    for line in ray_jobs.status(args.job):
        print(line)
    return 0


def run_logs(args: argparse.Namespace) -> int:
    """`batch logs`: 0. Raises PomariumError."""
    from pomarium.cluster.batch import ray_jobs

    for piece in ray_jobs.logs(args.job, follow=args.follow):
        print(piece, end="", flush=True)
    return 0


def run_cancel(args: argparse.Namespace) -> int:
    """`batch cancel`: 0. Raises PomariumError."""
    from pomarium.cluster.batch import ray_jobs

    print(f"{args.job} {ray_jobs.cancel(args.job)}")
    return 0
