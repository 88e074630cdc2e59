"""Batches as jobs of the rack's head: Ray keeps their names, states and logs, and runs them there.

    arguments of `batch submit` --submit--> Ray's job server on the head --> python -m pomarium.cluster.batch there

Asked over HTTP with the rack's token (ray.job_submission), so this process needs no connection to Ray, and no proxy.
"""

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pomarium.cluster.node.direct import direct
from pomarium.cluster.rack import current
from pomarium.worker.address import host_of
from pomarium.worker.errors import PomariumError, SettingsError

KIND = {"pomarium": "batch"}
"""Marks our jobs among others of the rack."""


class JobError(PomariumError):
    """The rack's job server refuses, does not answer, or knows no such job; says what it said."""


def submit(arguments: Sequence[str]) -> str:
    """Have the head run a batch with the `arguments` of `batch run`, in this process's folder; the job's name.

    Raises:
        SettingsError: no rack is up here. JobError.
    """
    command = shlex.join([sys.executable, "-m", "pomarium.cluster.batch", *arguments])
    with _client() as client:
        return str(client.submit_job(entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {command}", metadata=KIND))


def status(job: str | None) -> list[str]:
    """A line for the job, or for each of our jobs, the latest first. Raises as `submit`."""
    with _client() as client:
        if job is not None:
            return [_line(client.get_job_info(job))]
        found = [info for info in client.list_jobs() if (info.metadata or {}).items() >= KIND.items()]
    found.sort(key=lambda info: info.start_time or 0, reverse=True)
    return [_line(info) for info in found] or ["no batch was submitted to this rack"]


def logs(job: str, *, follow: bool) -> Iterator[str]:
    """What the job has said; with `follow` until it ends. Raises as `submit`."""
    with _client() as client:
        if not follow:
            yield client.get_job_logs(job)
            return
        pieces = client.tail_job_logs(job)
        with asyncio.Runner() as runner:
            while (piece := runner.run(_next(pieces))) is not None:
                yield piece


def cancel(job: str) -> str:
    """End the job; what became of it. Raises as `submit`."""
    with _client() as client:
        client.stop_job(job)
        return str(client.get_job_status(job))


async def _next(pieces: Any) -> str | None:
    piece: str | None = await anext(pieces, None)
    return piece


def _line(info: Any) -> str:
    return f"{info.submission_id}  {info.status}  {' '.join((info.message or '').split())}".rstrip()


@contextmanager
def _client() -> Iterator[Any]:
    rack = current.enter()
    if rack is None:
        raise SettingsError(current.NO_RACK)
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    os.environ.update(direct(os.environ, host_of(rack.address)))
    url = current.for_ray_commands(rack)["RAY_API_SERVER_ADDRESS"]
    try:
        yield JobSubmissionClient(url)
    except (RuntimeError, OSError) as error:  # requests' exceptions are OSErrors
        raise JobError(f"The job server of the rack at {url}: {' '.join(str(error).split())[:400]}") from error
