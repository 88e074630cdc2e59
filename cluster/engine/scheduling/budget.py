"""How many tokens the next step may have, so that it stays within the seconds that were asked for: pure decisions.

    Demand (what decodes, which prompts wait), StepTimes, Limits --plan--> Budget

Requests that decode ride in every step, a row each; what is decided is how many tokens of prompts ride along. Their
number is the largest for which the step is expected to take at most its target, or twice what it takes without them:
on a device that reads the weights for seconds, chunks that fit into the target would spend all time on reading. Bounds:

- at most what the configuration allows (max_num_batched_tokens), which is all there is to it on a fast device;
- at most GROWTH times the rows that were seen in a step, FIRST_TOKENS before any was: nothing is asked of a device that
  is far beyond what it has shown. A few steps after the start a fast one is at its limit;
- at least MIN_TOKENS, whatever they take: a prompt gets on.

Where the target is what limits a step, the prompts that have come share it (`level`): a short one behind long ones is
through in a few steps, and need not wait for all of them. As many share as find room in the KV cache together; more
would push each other out of it. Where it does not limit, they come one after another, vLLM's way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pomarium.cluster.executor.step_time import StepTimes, Work, rows_at

FIRST_TOKENS = 32
GROWTH = 4
MIN_TOKENS = 16
MIN_SHARE = 4
"""Tokens of one prompt beside others: a step's cost is by its rows, whosever they are."""


@dataclass(frozen=True)
class Limits:
    """Of the engine: tokens per step, and per request in it (0: none)."""

    step_tokens: int
    request_tokens: int = 0


@dataclass(frozen=True)
class Prompt:
    """What is known of a request with tokens to compute. position: of the first of them, or later if that is open."""

    tokens: int
    position: int


@dataclass(frozen=True)
class Demand:
    """What the next step has to choose from.

    Attributes:
        decoding: rows that are sure to be in it. prompts: in the order in which vLLM serves them.
        room: tokens that the KV cache has room for.
    """

    decoding: Work
    prompts: Sequence[Prompt]
    room: int


@dataclass(frozen=True)
class Budget:
    """Limits of the next step.

    Attributes:
        bound: they are below the engine's.
        ceiling: tokens that a step may have, where what waits is enough to tell.
    """

    limits: Limits
    bound: bool = False
    ceiling: int | None = None


def target(decoding: Work, step_s: float, gap_s: float, stages: int) -> float:
    """Seconds that the next step is to take at most.

    Args:
        decoding: what is sure to be in it. step_s: for any step. gap_s: from one token of an answer to its next; 0: as
            for any step. stages: that a token passes before its next can be computed.
    """
    return min(step_s, gap_s / stages) if decoding.rows and gap_s else step_s


def plan(demand: Demand, times: StepTimes, limits: Limits, target_s: float) -> Budget:
    """See the module. A step without prompts is not limited: what decodes is sure to ride."""
    open_tokens = limits.step_tokens - demand.decoding.rows
    if not demand.prompts or open_tokens <= MIN_TOKENS:
        return Budget(limits)
    wanted = min(open_tokens, sum(_capped(prompt.tokens, limits.request_tokens) for prompt in demand.prompts))
    most = max(MIN_TOKENS, min(wanted, GROWTH * times.most_rows or FIRST_TOKENS))
    if times.seconds(_work(demand, most)) > target_s:
        times = times.fresh()
    allowed_s = max(target_s, 2 * times.seconds(demand.decoding))
    tokens = _largest(lambda count: times.seconds(_work(demand, count)) <= allowed_s, MIN_TOKENS, most)
    if tokens >= wanted:
        return Budget(limits, ceiling=limits.step_tokens if wanted == open_tokens else None)
    each = level([prompt.tokens for prompt in _sharing(demand, tokens)], tokens)
    step_tokens = demand.decoding.rows + tokens
    return Budget(Limits(step_tokens, _capped(each, limits.request_tokens)), True, step_tokens)


def level(sizes: Sequence[int], tokens: int) -> int:
    """How many tokens each may take at most so that all together take about `tokens`; 1 or more."""
    left, rest = tokens, sorted(sizes)
    for index, size in enumerate(rest):
        share = -(-left // (len(rest) - index))
        if size >= share:
            return max(1, share)
        left -= size
    return max(1, tokens)


def _sharing(demand: Demand, tokens: int) -> Sequence[Prompt]:
    """The prompts that share `tokens`: at least MIN_SHARE each, and all find room to be computed whole."""
    count, room = 0, demand.room
    for prompt in demand.prompts[: max(1, tokens // MIN_SHARE)]:
        room -= prompt.tokens
        if count and room < 0:
            break
        count += 1
    return demand.prompts[:count]


def _work(demand: Demand, tokens: int) -> Work:
    """A step with so many tokens of prompts."""
    work = demand.decoding
    sharing = _sharing(demand, tokens)
    each = level([prompt.tokens for prompt in sharing], tokens)
    for prompt in sharing:
        taken = min(tokens, each, prompt.tokens)
        work += rows_at(prompt.position, taken)
        tokens -= taken
    return work if tokens <= 0 else work + rows_at(max(prompt.position for prompt in demand.prompts), tokens)


def _largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number up to `high` for which `holds`, which does so below any for which it does; `low` if none."""
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _capped(tokens: int, limit: int) -> int:
    return min(tokens, limit) if limit else tokens
