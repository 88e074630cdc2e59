"""What becomes of requests when more is asked than an endpoint can do: `pomarium serve` at 0.9 and 3 times of that.

    `pomarium serve`, the embedded model <--short streamed completions, each another prompt-- clients
        capacity: CLIENTS clients, each with one request after the other, ask again after 429 --> answers per second
        each of LOADS: requests at random times (Poisson) at so many times the capacity, none asks again
            --> first tokens of the admitted, share of the refused, and how long those waited to hear it

What comes in the first WARM_UP_S of each is not counted: a burst may wait for longer than what goes on and on
(cluster/endpoint/turns.py). The last lines say whether it is as it should be: p99 of the first token at the heaviest
load within twice that at the lightest, each refusal within a second.

    python benchmarks/overload.py [--seconds 30] [--tokens 16] [--seed 0] [--url http://127.0.0.1:8000] [vLLM arguments]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from report import table

from pomarium.cluster.node import ports

LOADS = (0.9, 3.0)
CLIENTS = 96
WARM_UP_S = 15.0
ALONE_S = 4.0
READY_S = 300.0
AGAIN_S = 0.3
WORDS = ("red", "blue", "green", "cold", "warm", "long", "short", "new", "deep", "high", "low", "fast", "slow", "dark")


@dataclass
class Seen:
    """Attributes:
    first_s: of each admitted request, until its first token. refused_s: of each refused one, until it knew.
    wrong: what else there was.
    """

    first_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where clients ask, and for what."""

    session: aiohttp.ClientSession
    url: str
    model: str
    tokens: int
    chance: random.Random

    async def ask(self, seen: Seen) -> bool:
        """One request; whether it was answered."""
        prompt = " ".join(self.chance.choices(WORDS, k=20))
        asked = {
            "model": self.model, "prompt": prompt, "max_tokens": self.tokens, "stream": True, "ignore_eos": True
        }  # fmt: skip
        began = time.monotonic()
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=asked) as response:
                if response.status == 429:
                    await response.read()
                    if "Retry-After" not in response.headers:
                        seen.wrong.append("429 without Retry-After")
                    seen.refused_s.append(time.monotonic() - began)
                    return False
                first, text = await response.content.readline(), b""
                first_s = time.monotonic() - began
                async for text in response.content:
                    if text.startswith(b"data: [DONE]"):
                        break
                if response.status != 200 or not text.startswith(b"data: [DONE]"):
                    seen.wrong.append(f"{response.status}: {(first + text)[:200]!r}")
                    return False
                seen.first_s.append(first_s)
                return True
        except aiohttp.ClientError as error:
            seen.wrong.append(f"{type(error).__name__}: {error}")
            return False


async def capacity(place: Place, seconds: float) -> float:
    """Requests per second."""
    seen, over = Seen(), False

    async def client() -> None:
        while not over:
            if not await place.ask(seen):
                await asyncio.sleep(AGAIN_S * (0.5 + place.chance.random()))

    alone = time.monotonic() + ALONE_S
    while time.monotonic() < alone:  # the engine sees what one gets
        await place.ask(seen)
    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(WARM_UP_S)
    before, began = len(seen.first_s), time.monotonic()
    await asyncio.sleep(seconds)
    found = (len(seen.first_s) - before) / (time.monotonic() - began)
    over = True
    await asyncio.gather(*clients)
    if seen.wrong:
        raise SystemExit(f"capacity: {seen.wrong[0]}")
    return found


async def offered(place: Place, per_s: float, seconds: float) -> Seen:
    """What clients meet that come at this rate."""
    early, seen, asked = Seen(), Seen(), set()
    began = due = time.monotonic()
    while (passed := due - began) < WARM_UP_S + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        asked.add(asyncio.create_task(place.ask(early if passed < WARM_UP_S else seen)))
        due += place.chance.expovariate(per_s)
    await asyncio.gather(*asked)
    seen.wrong += early.wrong
    return seen


def p(values: Sequence[float], share: float) -> float:
    """The value that so much of them does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def row(load: float, per_s: float, seen: Seen) -> list[str]:
    """Of the table."""
    asked = len(seen.first_s) + len(seen.refused_s)
    return [
        f"{load:g}x", f"{per_s:.1f}", str(asked), f"{len(seen.refused_s) / max(1, asked):.0%}",
        f"{statistics.median(seen.first_s or [float('nan')]):.2f}", f"{p(seen.first_s, 0.99):.2f}",
        f"{p(seen.refused_s, 0.5):.3f}", f"{max(seen.refused_s, default=float('nan')):.3f}", str(len(seen.wrong)),
    ]  # fmt: skip


HEAD = ["load", "asked/s", "asked", "refused", "TTFT p50 s", "p99 s", "refused in, p50 s", "worst s", "wrong"]


async def measure(url: str, args: argparse.Namespace) -> bool:
    """Whether it is as it should be."""
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = json.loads(await response.read())["data"][0]["id"]
        place = Place(session, url, model, args.tokens, random.Random(args.seed))
        found = await capacity(place, args.seconds)
        print(
            f"capacity {found:.1f} requests/s of {args.tokens} tokens, {CLIENTS} clients; seed {args.seed}", flush=True
        )
        met = {}
        for load in LOADS:
            met[load] = await offered(place, load * found, args.seconds)
    print(table(HEAD, [row(load, load * found, seen) for load, seen in met.items()]))
    light, heavy = met[LOADS[0]], met[LOADS[-1]]
    ratio = p(heavy.first_s, 0.99) / p(light.first_s, 0.99)
    slowest = max(heavy.refused_s, default=float("nan"))
    wrong = [said for seen in met.values() for said in seen.wrong]
    for said in wrong[:5]:
        print(f"wrong: {said}")
    checks = {
        f"p99 of the first token at {LOADS[-1]:g}x is {ratio:.2f} times that at {LOADS[0]:g}x (at most 2)": ratio <= 2,
        f"the slowest 429 took {slowest:.2f} s (at most 1)": slowest <= 1,
        f"{len(wrong)} requests neither answered nor refused": not wrong,
    }
    for said, good in checks.items():
        print(f"{'pass' if good else 'FAIL'}  {said}")
    return all(checks.values())


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[str]:
    """URL of a `pomarium serve` of our own."""
    port = ports.free(1)[0]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "pomarium.cluster.cli.main", "serve", "--port", str(port), *arguments]
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environ | {"XDG_STATE_HOME": folder}
        )
        try:
            deadline = time.monotonic() + READY_S
            while "ready" not in (said := (Path(folder) / "output").read_text()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(said)
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement, beside the warm-up")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of an endpoint that runs; else one is started, with the arguments that are left")
    args, rest = parser.parse_known_args()
    if args.url:
        asyncio.run(measure(args.url.rstrip("/"), args))
        return
    with served(rest) as url:
        asyncio.run(measure(url, args))


if __name__ == "__main__":
    main()
