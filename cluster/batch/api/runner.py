"""The endpoint's batches, one after another, answered through the endpoint itself: an actor beside the ingress.

    BatchStore (files on disk) --next batch that is not over--> batch.job over HttpEngine --> output and error file
         ^--- ingress: new batches, cancellations                      http://127.0.0.1:PORT, as any client

It keeps no state of its own: after a restart it goes on from what the batch's files hold, as `pomarium batch --resume`
does. An ingress starts it with the first batch, on its own machine, since both use one folder, and it ends with it. Of
several ingresses one has its `turn`; another takes it when that one has ended.
"""

import asyncio
import contextlib
import fcntl
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pomarium.cluster import faults
from pomarium.cluster.batch import job
from pomarium.cluster.batch.api.store import Batch, BatchStore, Counts, State, new_id
from pomarium.cluster.batch.http_engine import HttpEngine
from pomarium.cluster.batch.job import Files, Job
from pomarium.cluster.batch.progress import Tally
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often it is looked for new batches and cancellations: the folder is on this machine's disk."""

TURN_S = 1.0
"""How often it is looked whether the ingress that has the turn has ended."""

DISK_S = 10.0
"""Pause after a record could not be read or written, such as on a full disk."""

ROOM = 64
"""Requests of batches at the endpoint at once, which has people's go first (endpoint/gate.py)."""


class BatchRunner:
    """Ray actor class. `folder`: of the store. `url`, `key`: of the endpoint."""

    def __init__(self, folder: str, url: str, key: str | None) -> None:
        self._store, self._url, self._key = BatchStore(Path(folder)), url, key

    async def run_for_ever(self) -> None:
        """Bring one batch after another to its end, the oldest first. A fault of ours ends a batch, never the loop."""
        over: set[str] = set()
        while True:
            try:
                found = self._store.batches(over)
                over |= {batch.id for batch in found if batch.status.over}
                waiting = [batch for batch in found if not batch.status.over]
                if not waiting:
                    await asyncio.sleep(LOOK_S)
                    continue
                await self._run(waiting[-1])
            except OSError:
                logger.exception("Batches wait for their disk, and go on from their files.")
                await asyncio.sleep(DISK_S)

    async def _run(self, shown: Batch) -> None:
        """Bring one batch to its end. Raises OSError if its record cannot be read or written."""
        batch = shown if shown.output_file_id else self._begin(shown)
        tally = Tally()
        try:
            with self._open(batch) as files:
                batch = replace(batch.entered(State.IN_PROGRESS), counts=Counts(total=files.total))
                self._store.put_batch(batch)
                try:
                    finished = await self._answer(batch, files, tally)
                finally:
                    batch = replace(batch, counts=self._counts(files, tally))
        except OSError:
            raise
        except Exception as error:
            logger.exception("Batch %s failed.", batch.id)
            failed = replace(self._register(batch), error=faults.sentence(error))
            self._store.put_batch(failed.entered(State.FAILED))
            return
        batch = batch.entered(State.FINALIZING)
        self._store.put_batch(batch)
        self._store.put_batch(self._register(batch).entered(State.COMPLETED if finished else State.CANCELLED))

    def _begin(self, batch: Batch) -> Batch:
        """Give it its result files, before anything is written to them."""
        begun = replace(batch, status=State.VALIDATING, output_file_id=new_id("file-"), error_file_id=new_id("file-"))
        self._store.put_batch(begun)
        return begun

    def _open(self, batch: Batch) -> Files:
        self._store.file(batch.input_file_id)  # raises if it was deleted
        source, out, errors = (
            str(self._store.content(name or ""))
            for name in (batch.input_file_id, batch.output_file_id, batch.error_file_id)
        )
        return Files.open(Job(source, out, errors, resume=True))

    async def _answer(self, batch: Batch, files: Files, tally: Tally) -> bool:
        """False if it was cancelled."""
        # An endpoint that lacks its Macs is waited for, however long: the batch is the endpoint's own.
        engine = HttpEngine(self._url, self._key, ROOM, math.inf, math.inf, own=True)
        work = asyncio.create_task(job.run(files, [engine], tally, lambda: None, lambda: None))
        try:
            while not work.done():
                if self._store.cancel_wanted(batch.id):
                    return False
                if (counts := self._counts(files, tally)) != batch.counts:
                    batch = replace(batch, counts=counts)
                    self._store.put_batch(batch)
                await asyncio.wait({work}, timeout=LOOK_S)
            work.result()
            return True
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, PomariumError):
                await work
            await engine.close()

    def _counts(self, files: Files, tally: Tally) -> Counts:
        """What is in the files, by this run and those before it."""
        return Counts(files.total, files.answered + tally.results, files.refused + tally.errors)

    def _register(self, batch: Batch) -> Batch:
        """Make files of the results; one that is empty, or was never opened, is none."""
        output = self._kept(batch.output_file_id, f"{batch.id}_output.jsonl")
        errors = self._kept(batch.error_file_id, f"{batch.id}_error.jsonl")
        return replace(batch, output_file_id=output, error_file_id=errors)

    def _kept(self, name: str | None, filename: str) -> str | None:
        assert name is not None  # `_begin` gave it
        path = self._store.content(name)
        if not path.exists() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            return None
        return self._store.register_file(name, filename, "batch_output").id


async def turn(folder: Path) -> IO[str]:
    """Wait until no other process has the turn of the batches in `folder`. Who has it keeps it until it ends."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "turn").open("w")
        except OSError:
            logger.exception("Batches wait for their disk.")
            await asyncio.sleep(DISK_S)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            await asyncio.sleep(TURN_S)
        else:
            return lock


def start(store: BatchStore, url: str, key: str | None) -> Any:
    """The runner as an actor on this machine; it ends with the last handle to it, and is started anew if it is lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    runner = ray.remote(BatchRunner).options(**options).remote(str(store.folder), url, key)
    runner.run_for_ever.remote()
    return runner
