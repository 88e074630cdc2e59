"""Which running requests a step of a pipeline takes, and how many tokens of prompts: pure decisions over plain facts.

    Running, Waiting, Limits --plan_step--> StepPlan

S stages are busy at once only if S disjoint sets of requests, the cohorts, follow each other through them. No request
is pinned to a cohort: a request whose token was scheduled in step n is back in step n + S, so that the steps of one
round, S in a row, are the cohorts, and `take` evens them out as requests come and go.

Decoding requests and prompts are shared out apart. A request that decodes costs a token and then waits for it; a prompt
waits for nothing, so that its chunks can follow each other through the stages, one in every step. Two rules:

- A step takes its share of the decoding and of the new requests (`take`), the longest unserved first.
- A step takes at most 1/S of the prompt tokens that are waiting to be computed (`chunk`), but not so few that a step's
  fixed cost outweighs them. Else the one step that holds a prompt would keep one stage after the other busy and the
  rest idle: cut in S, it passes them in (2 S - 1) / S of the time of a stage instead of S times that. And a step with
  requests to decode never carries much more than the steps beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_CHUNK_TOKENS = 128
"""Prompt tokens that a step may always take.

A step costs a + b x tokens: a to read the weights, b x tokens for the arithmetic. Both are equal at a / b tokens, which
is 20 to 40 on Apple GPUs with 16-bit weights (FLOPS over bandwidth), fewer with quantised ones. At 128 the fixed cost
that each further chunk adds is at most a quarter of its time. A step-time curve measured on a Mac may change it."""


@dataclass(frozen=True)
class Running:
    """A running request that still has something to compute.

    Attributes:
        tokens: how many it could compute in this step, limits aside; 0 while its token is awaited (sync scheduling).
        prefilling: its tokens are known ones and none of them is in flight.
        served: step in which its last token was scheduled, 0 if none was.
        in_flight: that token has not come back to the scheduler.
    """

    id: str
    tokens: int
    prefilling: bool
    served: int
    in_flight: bool


@dataclass(frozen=True)
class Waiting:
    """Requests that could be admitted, and how many tokens they have to compute."""

    requests: int
    tokens: int


@dataclass(frozen=True)
class Limits:
    """Of the engine.

    Attributes:
        step_tokens: per step (max_num_batched_tokens).
        request_tokens: per request and step (long_prefill_token_threshold); 0 for none.
        chunked: prompts may be cut.
    """

    step_tokens: int
    request_tokens: int
    chunked: bool


@dataclass(frozen=True)
class StepPlan:
    """What a step may take.

    Attributes:
        ids: of the running requests.
        admitted: at most so many waiting requests.
        limits: for this step, never above the engine's.
    """

    ids: frozenset[str]
    admitted: int
    limits: Limits


@dataclass(frozen=True)
class Measured:
    """What the number of cohorts follows from.

    Attributes:
        streams: requests that decode together. step_ms: a stage's time for a step of so many tokens.
        link_ms: from stage to stage, and between engine and stages. engine_ms: the engine's time for a step.
    """

    streams: int
    step_ms: Callable[[int], float]
    link_ms: float
    engine_ms: float


def cohorts(stages: int, measured: Measured | None = None) -> int:
    """How many cohorts to keep in flight: S, or one more where that is measured to be faster.

    Fewer than S leave stages idle and never gain, as no larger batch is faster than a smaller one; where a step takes
    the same time whatever its batch, they lose nothing either. One more hides the links, which S cohorts wait for, but
    pays a step's fixed cost once more in each round. With steps of a + b x tokens it gains if links take between a / S
    and b x streams / (S + 1) less the engine's time: slow links, small models, many streams. Wired Macs (0.3 ms against
    several) are far from it. So S unless measurements say otherwise.
    """
    if measured is None:
        return stages
    return min((stages, stages + 1), key=lambda count: round_ms(stages, count, measured))


def round_ms(stages: int, cohorts: int, measured: Measured) -> float:
    """Time in which each stream gets one token: a stage computes all cohorts, and none overtakes its own token.

    The queue holds S + 1 steps, so that of S cohorts one is queued before its tokens are back, and they go straight to
    the first stage; of S + 1 none is, and they go by the engine.
    """
    sizes = even(measured.streams, cohorts)
    busy = sum(measured.step_ms(size) for size in sizes if size)
    by_engine = measured.engine_ms + measured.link_ms if cohorts > stages else 0.0
    return max(busy, stages * (measured.step_ms(sizes[0]) + measured.link_ms) + by_engine)


def even(requests: int, cohorts: int) -> tuple[int, ...]:
    """`requests` in `cohorts` parts that differ by at most one, the larger first."""
    low, rest = divmod(requests, cohorts)
    return (low + 1,) * rest + (low,) * (cohorts - rest)


def take(ready: int, later: Sequence[int]) -> int:
    """How many of the requests that are ready a step takes.

    Args:
        later: how many more come back for each of the other steps of the round, the next step first.

    No step takes more than its even share, rounded up. A request is held back only for a step of this round that would
    otherwise fall short of its even share, rounded down. So a step takes at least one request if one is ready.
    """
    steps = len(later) + 1
    live = ready + sum(later)
    low, high = live // steps, -(-live // steps)
    missing = sum(max(0, low - size) for size in later)
    return min(ready, max(low, min(high, ready - missing)))


def chunk(tokens: int, cohorts: int, limit: int) -> int:
    """How many prompt tokens a step takes, of `tokens` to be computed. `limit` is the most it may take."""
    return min(limit, max(MIN_CHUNK_TOKENS, -(-tokens // cohorts)))


def plan_step(step: int, cohorts: int, running: Sequence[Running], waiting: Waiting, limits: Limits) -> StepPlan:
    """What step number `step` may take; see the module. `running` is in the order in which vLLM serves it."""
    ready, later = _decoding(step, cohorts, running)
    # Those that wait count, but may turn out not to fit: they must not make one step take what others should.
    share = take(len(ready) + waiting.requests, later)
    chosen = ready[: min(share, take(len(ready), later))]
    prompts = [request for request in running if request.prefilling]
    limits = _limits(cohorts, len(chosen), sum(prompt.tokens for prompt in prompts) + waiting.tokens, limits)
    first = _first_prompts(prompts, limits.step_tokens - len(chosen), limits)
    return StepPlan(frozenset(request.id for request in chosen) | first, share - len(chosen), limits)


def _decoding(step: int, cohorts: int, running: Sequence[Running]) -> tuple[list[Running], list[int]]:
    """Requests that can decode in this step, the longest unserved first; how many come back in the steps after it."""
    ready: list[Running] = []
    later = [0] * (cohorts - 1)
    for request in running:
        if request.prefilling:
            continue
        wait = request.served + cohorts - step if request.in_flight else 0
        if wait <= 0 and request.tokens > 0:
            ready.append(request)
        elif later:
            later[max(wait, 1) - 1] += 1
    ready.sort(key=lambda request: request.served)
    return ready, later


def _limits(cohorts: int, decoding: int, prompt_tokens: int, limits: Limits) -> Limits:
    if not limits.chunked or prompt_tokens == 0:
        return limits
    share = chunk(prompt_tokens, cohorts, limits.step_tokens)
    request_tokens = min(share, limits.request_tokens) if limits.request_tokens else share
    return Limits(min(limits.step_tokens, decoding + share), request_tokens, True)


def _first_prompts(prompts: Sequence[Running], tokens: int, limits: Limits) -> frozenset[str]:
    """The first prompts, until they fill `tokens`: vLLM would give the ones after them what is meant for decoding."""
    ids = set()
    for prompt in prompts:
        if tokens <= 0:
            break
        ids.add(prompt.id)
        tokens -= min(prompt.tokens, limits.request_tokens or prompt.tokens)
    return frozenset(ids)
