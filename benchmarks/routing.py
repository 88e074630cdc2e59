"""Users who share system prompts, over two replicas: how much of their prompts is found cached, and how soon the first
token comes, by the way in which replicas are chosen.

    session.serving(2 replicas, routers.SideBySide) <--HTTP, `user` names the policy-- rounds of requests --> Markdown

All policies choose among the same two running engines, in turns and with system prompts of their own, so that none
finds what another has left: Serve's power of two choices, Ray Serve LLM's PrefixCacheAffinityRouter (given the text of
our request's body, which it cannot read by itself) and Pomarium's PrefixRouter.

Then Pomarium as it is, without calls where it needs none, with as many ingresses as --ingresses says, one after the
other: each request is sent by a connection of its own, and reaches any of them.

    python benchmarks/routing.py [--model FOLDER] [--systems 6] [--users 6] [--system-words 300] [--rounds 2]
                                 [--policies ...] [--ingresses 1 2]
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import httpx
from measure import Load, percentile

POLICIES = ("power of two", "Ray Serve LLM", "Pomarium")
REPLICAS = 2
ANSWER_TOKENS = 8
REQUEST_S = 600.0


@dataclass(frozen=True)
class Answer:
    """One request: seconds to its first token, tokens of its prompt, and how many of them were cached."""

    first_token_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Figures:
    """All requests of one policy. `seconds`: of all its rounds; `others`: cores that other programs kept busy."""

    answers: tuple[Answer, ...]
    seconds: float
    others: float

    @property
    def cached_share(self) -> float:
        """Cached tokens of all prompt tokens."""
        return sum(a.cached_tokens for a in self.answers) / sum(a.prompt_tokens for a in self.answers)

    def first_token(self, share: float) -> float:
        """Seconds in which `share` of the requests had their first token."""
        return percentile([a.first_token_s for a in self.answers], share)


def conversations(policy: str, options: argparse.Namespace, turn: int) -> list[list[dict[str, str]]]:
    """Each user's messages, in the order in which they arrive: the system prompts are this policy's and round's own."""
    source = random.Random(f"{options.seed} {policy} {turn}")
    words = [f"{source.choice('bcdfgklmnprst')}{source.choice('aeiou')}{source.choice('lmnrst')}" for _ in range(200)]
    systems = [" ".join(source.choices(words, k=options.system_words)) for _ in range(options.systems)]
    arrivals = [
        [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{user}: {' '.join(source.sample(words, 8))}?"},
        ]
        for user in range(options.users)
        for system in systems
    ]
    source.shuffle(arrivals)
    return arrivals


async def ask(client: httpx.AsyncClient, policy: str, messages: Sequence[dict[str, str]]) -> Answer:
    """One streamed request.

    Raises:
        RuntimeError: if it is not answered.
    """
    body = {
        "messages": messages,
        "user": policy,
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, first, usage = time.perf_counter(), 0.0, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                first = time.perf_counter() - sent
            usage = chunk.get("usage") or usage
    if usage is None or not first:
        raise RuntimeError(f"a request was not answered: HTTP {answer.status_code}")
    details = usage["prompt_tokens_details"] or {}
    return Answer(first, usage["prompt_tokens"], details.get("cached_tokens") or 0)


async def one_round(url: str, policy: str, options: argparse.Namespace, turn: int) -> Figures:
    """All users' requests of one policy, `options.clients` of them at a time."""
    waiting = iter(conversations(policy, options, turn))
    answers: list[Answer] = []

    async def client_loop(client: httpx.AsyncClient) -> None:
        for messages in waiting:
            answers.append(await ask(client, policy, messages))

    load, began = Load(), time.perf_counter()
    fresh = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_S, trust_env=False, limits=fresh) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(options.clients)))
    return Figures(tuple(answers), time.perf_counter() - began, load.others())


def together(rounds: Sequence[Figures]) -> Figures:
    """The figures of all rounds of one policy."""
    answers = tuple(a for figures in rounds for a in figures.answers)
    return Figures(answers, sum(f.seconds for f in rounds), max(f.others for f in rounds))


def table(found: dict[str, Figures]) -> str:
    """A row for each policy."""
    lines = [
        "| replica chosen by | cached tokens | first token p50, s | p90, s | all requests, s | others' cores |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for policy, f in found.items():
        first = f"{f.first_token(0.5):.2f} | {f.first_token(0.9):.2f}"
        lines.append(f"| {policy} | {f.cached_share:.0%} | {first} | {f.seconds:.1f} | {f.others:.2f} |")
    return "\n".join(lines)


@contextlib.contextmanager
def endpoint(options: argparse.Namespace, router: str | None, ingresses: int) -> Iterator[str]:
    """URL of two replicas. router: that chooses one, None for the endpoint's own."""
    from pomarium.cluster.endpoint import lifecycle, local_ray
    from pomarium.cluster.replica.serve_plan import ModelPlan, ServePlan

    os.environ.update(local_ray.environment(""))  # Ray reads it when it is imported, which the next line does
    from pomarium.cluster.endpoint import app

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        yield

    arguments = {"enable_prompt_tokens_details": True}
    models = (ModelPlan("model", options.model, arguments, REPLICAS),)
    plan = ServePlan(models, port=options.port, ingresses=ingresses)
    with mock.patch.object(app, "ROUTER", router or app.ROUTER), lifecycle.serving(plan, phase):
        yield plan.url


def apart(*arguments: Any) -> dict[str, list[Figures]]:
    """What `measured` finds in a process of its own: a process starts one Ray, whose token it keeps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, *arguments).result()


def measured(
    options: argparse.Namespace, router: str | None, ingresses: int, names: Sequence[str], policies: Mapping[str, str]
) -> dict[str, list[Figures]]:
    """The rounds of each of `names`, in turns. policies: whose prompts each sends."""
    rounds: dict[str, list[Figures]] = {name: [] for name in names}
    with endpoint(options, router, ingresses) as url:
        asyncio.run(one_round(url, "", argparse.Namespace(**{**vars(options), "users": 2, "systems": 2}), -1))  # warm
        for turn in range(options.rounds):
            for name in names:
                rounds[name].append(asyncio.run(one_round(url, policies[name], options, turn)))
                print(f"round {turn + 1}, {name}: {rounds[name][-1].seconds:.1f} s", flush=True)
    return rounds


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model (default: the embedded one)")
    parser.add_argument("--systems", type=int, default=6, help="system prompts per round and policy")
    parser.add_argument("--users", type=int, default=6, help="requests per system prompt")
    parser.add_argument("--system-words", type=int, default=300, help="length of a system prompt")
    parser.add_argument("--clients", type=int, default=4, help="requests that run at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=POLICIES, help="side by side")
    parser.add_argument("--ingresses", type=int, nargs="*", default=[1, 2], help="of Pomarium as it is")
    options = parser.parse_args()
    rounds: dict[str, list[Figures]] = {}
    if options.policies:
        same = {policy: policy for policy in options.policies}
        rounds = apart(options, "routers.SideBySide", 1, options.policies, same)
    for count in options.ingresses:
        name = f"Pomarium, {count} ingress" + ("es" if count > 1 else "")
        rounds |= apart(options, None, count, [name], {name: "Pomarium"})
    requests = options.rounds * options.systems * options.users
    prompts = [a.prompt_tokens for figures in rounds.values() for a in figures[0].answers]
    print(
        f"\n{REPLICAS} replicas; for each policy {requests} requests of about {sum(prompts) // len(prompts)} tokens, "
        f"{options.users} for each system prompt, {options.clients} at once\n\n"
        + table({policy: together(figures) for policy, figures in rounds.items()})
    )


if __name__ == "__main__":
    main()
