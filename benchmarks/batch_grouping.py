"""What it gives to ask prompts that begin alike one after another: shuffled questions about documents, as a batch.

    a batch's lines --job.run, windows of 1 and of 4096, in turns--> a running endpoint --> cached share, time

The endpoint's cache has to be smaller than the documents together, as it is with real ones:

    pomarium serve --max-model-len 1024 --kv-cache-memory-bytes 134217728 --enable-prompt-tokens-details
    python benchmarks/batch_grouping.py http://127.0.0.1:8000

Each round has documents of its own, so that none finds what another has left.
"""

import argparse
import asyncio
import json
import random
import tempfile
from pathlib import Path

from pomarium.cluster.batch import grouping, job
from pomarium.cluster.batch.http_engine import HttpEngine
from pomarium.cluster.batch.job import Files, Job
from pomarium.cluster.batch.progress import Tally

ANSWER_TOKENS = 8


def write(path: Path, options: argparse.Namespace, name: str) -> None:
    """The file IN: `questions` about each of `documents`, shuffled."""
    source = random.Random(name)
    words = [f"{source.choice('bcdfgklmnprst')}{source.choice('aeiou')}{source.choice('lmnrst')}" for _ in range(200)]
    lines = []
    for document in range(options.documents):
        text = " ".join(source.choices(words, k=options.words))
        for question in range(options.questions):
            body = {"prompt": f"{text}\nQuestion {question}: {source.choice(words)}?", "max_tokens": ANSWER_TOKENS}
            lines.append(
                {"custom_id": f"{document}-{question}", "method": "POST", "url": "/v1/completions", "body": body}
            )
    source.shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


async def answer(files: Files, options: argparse.Namespace, window: int) -> Tally:
    """Run the job."""
    tally = Tally()
    engine = HttpEngine(options.url, None, options.concurrency)
    try:
        await job.run(files, [engine], tally, lambda: None, lambda: None, window)
    finally:
        await engine.close()
    return tally


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print("| round | prompts are asked | cached tokens | s |\n|---:|---|---:|---:|")
    for turn in range(options.rounds):
        for name, window in (("as they stand in IN", 1), ("grouped", grouping.WINDOW)):
            with tempfile.TemporaryDirectory() as folder:
                files = [str(Path(folder) / file) for file in ("in.jsonl", "out.jsonl", "errors.jsonl")]
                write(Path(files[0]), options, f"{name} {turn}")
                with Files.open(Job(*files)) as opened:
                    tally = asyncio.run(answer(opened, options, window))
                    seconds = tally.seconds
            if tally.errors:
                raise RuntimeError(f"{tally.errors} requests were refused")
            share = tally.cached / tally.prompt
            print(f"| {turn + 1} | {name} | {share:.0%} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
