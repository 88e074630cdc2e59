"""One batch, from its files to its files, whoever answers.

    IN --output.lines, ledger.pending--> Requests --grouping--> dispatch.run(engines) --answered--> OUT, ERRORS
                                    '--> Rejections --> ERRORS

What can be known to be wrong without an engine (files, earlier results) is found by `Files.open`, before one starts.
OUT and ERRORS together are the whole state of a job: `resume` reads them, and asks what they do not answer.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from pomarium.cluster.batch import dispatch, output
from pomarium.cluster.batch.dispatch import Engine
from pomarium.cluster.batch.grouping import WINDOW, grouped
from pomarium.cluster.batch.ledger import Ledger
from pomarium.cluster.batch.lines import Answer, Request, refusal_line, rejection_line, result_line
from pomarium.cluster.batch.output import Appender, BatchFileError, Place
from pomarium.cluster.batch.progress import Tally


@dataclass(frozen=True)
class Job:
    """Attributes:
    source, out, errors: files, as fsspec names them.
    resume: go on from what OUT and ERRORS hold. overwrite: drop it.
    """

    source: str
    out: str
    errors: str
    resume: bool = False
    overwrite: bool = False


class Files:
    """The open files of a job. A context; leaving it writes what is held."""

    def __init__(self, source: Place, out: Appender, errors: Appender, ledger: Ledger, total: int) -> None:
        """Made by `open`.

        total: lines of IN that are not blank. answered, refused: results and errors that were there before.
        """
        self.source, self.out, self.errors, self.ledger, self.total = source, out, errors, ledger, total
        self.answered, self.refused = ledger.answered, ledger.refused

    @classmethod
    def open(cls, job: Job) -> "Files":
        """Check, recover and open the files of `job`.

        Raises:
            BatchFileError: IN cannot be read, OUT or ERRORS cannot be written or hold something already, or two of
                them are one file.
        """
        source, out, errors = (output.place(name) for name in (job.source, job.out, job.errors))
        for first, second in ((source, out), (source, errors), (out, errors)):
            if output.same_file(first, second):
                raise BatchFileError(f"{first.name} and {second.name} are one file: name another.")
        total = sum(not text.isspace() for text in output.lines(source))
        ledger = Ledger()
        try:
            for where in (out, errors):
                _take_over(where, job, ledger)
            return cls(source, Appender(out), Appender(errors), ledger, total)
        except BaseException:
            ledger.__exit__()
            raise

    @property
    def before(self) -> int:
        """Lines that have had their answer before."""
        return self.answered + self.refused

    def __enter__(self) -> "Files":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        except BatchFileError:
            if not isinstance(error, BatchFileError):  # where a full disk has ended the job, that is what it ends with
                raise
        finally:
            self.ledger.__exit__()

    def flush(self) -> None:
        """Write what is held. Raises BatchFileError."""
        self.out.flush()
        self.errors.flush()


def _take_over(where: Place, job: Job, ledger: Ledger) -> None:
    if not where.system.exists(where.path) or not where.system.size(where.path):
        return
    if job.overwrite:
        where.system.rm(where.path)
    elif not job.resume:
        raise BatchFileError(f"{where.name} holds results: go on with --resume, or drop them with --overwrite.")
    else:
        output.recover(where)
        for custom_id, line in output.custom_ids(where):
            ledger.done(custom_id, line)


async def run(
    files: Files,
    engines: Sequence[Engine],
    tally: Tally,
    ready: Callable[[], None],
    moved: Callable[[], None],
    window: int = WINDOW,
) -> None:
    """Answer what is left of the job.

    Args:
        tally: counts. ready: told once an engine is. moved: told after each line.
        window: see grouping.grouped.

    Raises:
        BatchFileError: a file cannot be read or written any more.
        PomariumError: no engine answers.
    """

    def requests() -> Iterator[Request]:
        for asked in files.ledger.pending(output.lines(files.source)):
            if isinstance(asked, Request):
                yield asked
                continue
            files.errors.add(rejection_line(asked))
            tally.reject()
            moved()

    def answered(request: Request, answer: Answer) -> None:
        if answer.accepted:
            files.out.add(result_line(request, answer))
        else:
            files.errors.add(refusal_line(request, answer))
        tally.add(answer)
        moved()

    tasks = {
        asyncio.create_task(dispatch.run(engines, grouped(requests(), window), ready, answered)),
        asyncio.create_task(_flush(files)),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _flush(files: Files) -> None:
    """A result is in its file soon, also when the next one takes long."""
    while True:
        await asyncio.sleep(output.FLUSH_S)
        files.flush()
