"""A batch of very many tiny lines, with an engine that answers at once: is memory flat, and what does a line cost?

    python benchmarks/batch_rows.py [--rows 1000000]

Everything but the engine is the real thing: reading, the ledger of ids, grouping, dispatch, files on disk. Prints the
process's peak memory after each tenth of the rows (Linux: ru_maxrss), and lines per second.
"""

import argparse
import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path

from pomarium.cluster.batch import job
from pomarium.cluster.batch.job import Files, Job
from pomarium.cluster.batch.lines import Answer, Request
from pomarium.cluster.batch.progress import Tally

USAGE = {"prompt_tokens": 4, "completion_tokens": 2}
ANSWER = Answer(200, json.dumps({"id": "cmpl-1", "choices": [{"text": "ok"}], "usage": USAGE}).encode())


class InstantEngine:
    """A dispatch.Engine that computes nothing."""

    room = 384

    async def start(self) -> None:
        """Nothing to start."""

    async def answer(self, request: Request) -> Answer:
        """At the loop's next turn."""
        await asyncio.sleep(0)
        return ANSWER


def write(path: Path, rows: int) -> None:
    """The file IN."""
    with path.open("w") as file:
        for number in range(rows):
            body = {"prompt": f"Row {number % 1000}: ", "max_tokens": 2}
            line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def peak_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "in.jsonl", rows)
        asked = Job(*(str(folder / file) for file in ("in.jsonl", "out.jsonl", "errors.jsonl")))
        tally, tenth = Tally(), max(1, rows // 10)
        print("| lines | peak memory, MiB | s |\n|---:|---:|---:|")
        print(f"| 0 | {peak_mib():.0f} | 0 |", flush=True)
        began = time.perf_counter()

        def moved() -> None:
            if tally.results % tenth == 0:
                print(f"| {tally.results} | {peak_mib():.0f} | {time.perf_counter() - began:.0f} |", flush=True)

        with Files.open(asked) as files:
            asyncio.run(job.run(files, [InstantEngine()], tally, lambda: None, moved))
        with Path(asked.out).open("rb") as out:
            written = sum(1 for _ in out)
        seconds = time.perf_counter() - began
    if written != rows:
        raise RuntimeError(f"{written} results of {rows} lines")
    print(f"\n{rows / seconds:.0f} lines/s with their ends on disk")


if __name__ == "__main__":
    main()
