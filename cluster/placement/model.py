"""What placement is computed from, and what a given cut costs: frozen facts, pure functions. All sizes bytes, seconds.

    Rack, ModelProfile, Workload --evaluate--> Plan: memory and predicted times of a cut that somebody chose
                                 --place.py--> the cut that is best

A stage's step over a batch takes, for each of its layers, the larger of bytes read / memory bandwidth and operations /
FLOP/s (the roofline model: Williams, Waterman and Patterson, 2009), and a constant for the step. Prompt tokens come on
top, spread over the steps (`Workload.prompt_share`). A hop takes the link's latency and the activations' bytes /
bandwidth; token ids go back from the last stage to the first for one latency.

One stream: a token takes all stages, all hops and the way back, one after the other (`Plan.token_s`).
All streams: C = min(stages, streams) cohorts circulate. Each stage and link serves every cohort once a round, so
    round = max(C x slowest stage or link, one cohort's way around)        tokens/s = streams / round
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Link:
    """Between two Macs, either way. bandwidth: bytes/s. latency: seconds from sending to having received, one way."""

    bandwidth: float
    latency: float


ETHERNET = Link(bandwidth=1e9 / 8, latency=0.0003)
"""Gigabit Ethernet: what connects Macs of which nothing else is said."""


@dataclass(frozen=True)
class Network:
    """The links of a rack. `pairs`, by sets of two names, differ from `default`."""

    default: Link = ETHERNET
    pairs: Mapping[frozenset[str], Link] = field(default_factory=dict)


@dataclass(frozen=True)
class Mac:
    """Attributes: memory: bytes that a stage may take in all. bandwidth: bytes/s from memory. flops: FLOP/s."""

    name: str
    memory: int
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Rack:
    """The Macs that may be used. `links` holds the pairs, as sets of two names, that differ from `default_link`."""

    macs: tuple[Mac, ...]
    default_link: Link
    links: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def link(self, one: str, other: str) -> Link:
        """The link between two Macs."""
        return self.links.get(frozenset((one, other)), self.default_link)


@dataclass(frozen=True)
class LayerProfile:
    """What one layer costs.

    Attributes:
        weight_bytes: in memory. expert_bytes: those among them of routed experts.
        active_share: experts that one token uses / experts there are.
        flops: per token, active experts only, attention scores left out.
        attention_flops: per token and token of context.
        kv_bytes: K and V per token of context. window: tokens kept, None for all.
    """

    weight_bytes: int
    flops: float
    kv_bytes: int
    expert_bytes: int = 0
    active_share: float = 1.0
    attention_flops: float = 0.0
    window: int | None = None

    def bytes_read(self, batch: int) -> float:
        """Weights that a step over `batch` tokens reads; tokens choose their experts independently and evenly."""
        touched = 1.0 - (1.0 - self.active_share) ** batch
        return self.weight_bytes - self.expert_bytes * (1.0 - touched)


@dataclass(frozen=True)
class ModelProfile:
    """What a model costs; all sizes in bytes, in memory.

    Attributes:
        embedding_bytes: on the first stage. head_bytes: on the last, the final norm included, without a tied matrix.
        tied: the head multiplies by the embedding, so that the last stage needs it too.
        shared_bytes: on every stage.
        hidden_bytes: of one token's activations between layers. head_flops: per sampled token.
    """

    name: str
    layers: tuple[LayerProfile, ...]
    embedding_bytes: int
    head_bytes: int
    tied: bool
    hidden_bytes: int
    head_flops: float
    shared_bytes: int = 0

    @property
    def last_bytes(self) -> int:
        """What the last stage holds beside its layers, if it is not the first too."""
        return self.head_bytes + (self.embedding_bytes if self.tied else 0)

    @property
    def weight_bytes(self) -> int:
        """All weights, each once."""
        return sum(a.weight_bytes for a in self.layers) + self.embedding_bytes + self.head_bytes + self.shared_bytes


@dataclass(frozen=True)
class Workload:
    """What is asked of the model.

    Attributes:
        context: tokens, prompt and answer, that each stream's KV cache must hold. streams: at once.
        prompt_share: prompt tokens / all tokens computed, in [0, 1); prompts found in the cache do not count.
        chunk: prompt tokens computed in one step. block: tokens per KV block.
        stage_bytes: what a stage takes beside weights and KV cache. stage_s: constant seconds of a stage's step.
    """

    context: int
    streams: int = 1
    prompt_share: float = 0.0
    chunk: int = 2048
    block: int = 16
    stage_bytes: int = 0
    stage_s: float = 0.001

    @property
    def prompt_tokens(self) -> float:
        """Prompt tokens computed per token generated."""
        return self.prompt_share / (1.0 - self.prompt_share)

    def batch(self, stages: int) -> int:
        """Streams in the largest cohort."""
        return -(-self.streams // self.cohorts(stages))

    def cohorts(self, stages: int) -> int:
        """Groups of streams in flight at once."""
        return min(stages, self.streams)

    def kv_bytes(self, layer: LayerProfile) -> int:
        """K and V that one layer keeps, in whole blocks and with the block that vLLM sets aside.

        A window keeps its tokens, one block more for where it begins, and the chunk being computed
        (vllm/v1/kv_cache_interface.py, SlidingWindowSpec).
        """
        blocks = -(-self.context // self.block)
        if layer.window is None:
            return (self.streams * blocks + 1) * self.block * layer.kv_bytes
        windowed = -(-min(self.context, layer.window) // self.block) + 1
        kept = self.streams * min(blocks, windowed) + -(-self.chunk // self.block)
        return (min(kept, self.streams * blocks) + 1) * self.block * layer.kv_bytes


@dataclass(frozen=True)
class Stage:
    """One Mac's part: layers [first, end). Sizes in bytes, times in seconds.

    Attributes:
        overhead_bytes: beside weights and KV cache. memory: what the Mac offers.
        step_s: one step over a cohort. hop_s: from here to the next stage, or the token ids' way back.
        busy_s: the part of hop_s that occupies the link.
    """

    mac: str
    first: int
    end: int
    has_embedding: bool
    has_head: bool
    weight_bytes: int
    kv_bytes: int
    overhead_bytes: int
    memory: int
    step_s: float
    hop_s: float
    busy_s: float

    @property
    def used(self) -> int:
        """All that the stage takes."""
        return self.weight_bytes + self.kv_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Plan:
    """Stages in order, and what is predicted of them.

    Attributes:
        token_s: one stream's time per token, nobody else being served.
        round_s: all streams get one token each in this time. tokens_per_s: of all streams.
        bottleneck: the Mac, or "one -> other" for a link, that takes longest.
    """

    stages: tuple[Stage, ...]
    token_s: float
    round_s: float
    tokens_per_s: float
    bottleneck: str

    def cuts(self) -> tuple[tuple[str, int, int], ...]:
        """(Mac, first layer, end) of each stage: what `evaluate` takes."""
        return tuple((s.mac, s.first, s.end) for s in self.stages)


@dataclass(frozen=True)
class Refusal:
    """No plan.

    Attributes:
        reason: one sentence. missing: bytes, the least that must be added in all for a plan to exist; 0 if Macs are
            missing and not memory.
        shortfalls: one way to add them: (Mac, bytes), not empty ones.
    """

    reason: str
    missing: int = 0
    shortfalls: tuple[tuple[str, int], ...] = ()


def memory_needed(profile: ModelProfile, workload: Workload, first: int, end: int) -> tuple[int, int, int]:
    """(weights, KV cache, overhead) in bytes of a stage that holds the layers [first, end)."""
    held = profile.layers[first:end]
    weights = sum(layer.weight_bytes for layer in held) + profile.shared_bytes
    if first == 0:
        weights += profile.embedding_bytes
    if end == len(profile.layers):
        weights += profile.head_bytes if first == 0 else profile.last_bytes
    return weights, sum(workload.kv_bytes(layer) for layer in held), workload.stage_bytes


def layer_seconds(layer: LayerProfile, mac: Mac, workload: Workload, batch: int) -> float:
    """A layer's part of a step over `batch` streams, with the prompt tokens that come with them."""
    context = workload.context if layer.window is None else min(layer.window, workload.context)
    flops = layer.flops + layer.attention_flops * context
    read = layer.bytes_read(batch) + batch * layer.kv_bytes * context
    prompt = batch * workload.prompt_tokens
    return max(read / mac.bandwidth, batch * flops / mac.flops) + prompt * max(
        layer.weight_bytes / workload.chunk / mac.bandwidth, flops / mac.flops
    )


def head_seconds(profile: ModelProfile, mac: Mac, batch: int) -> float:
    """The final norm and the head over `batch` sampled tokens; prompt tokens need neither."""
    return max(profile.last_bytes / mac.bandwidth, batch * profile.head_flops / mac.flops)


def link_busy_seconds(profile: ModelProfile, link: Link, workload: Workload, batch: int) -> float:
    """How long one cohort's activations occupy a link."""
    return batch * (1.0 + workload.prompt_tokens) * profile.hidden_bytes / link.bandwidth


def evaluate(rack: Rack, profile: ModelProfile, workload: Workload, cuts: Sequence[tuple[str, int, int]]) -> Plan:
    """The figures of a given cut: (Mac, first layer, end) per stage, in order. Does not ask whether it fits."""
    cohorts = workload.cohorts(len(cuts))
    stages = _stages(rack, profile, workload, cuts, workload.batch(len(cuts)))
    alone = _stages(rack, profile, workload, cuts, 1)
    slowest = max(max(s.step_s, s.busy_s) for s in stages)
    round_s = max(cohorts * slowest, sum(s.step_s + s.hop_s for s in stages))
    return Plan(
        stages,
        token_s=sum(s.step_s + s.hop_s for s in alone),
        round_s=round_s,
        tokens_per_s=workload.streams / round_s,
        bottleneck=_bottleneck(stages),
    )


def _stages(
    rack: Rack, profile: ModelProfile, workload: Workload, cuts: Sequence[tuple[str, int, int]], batch: int
) -> tuple[Stage, ...]:
    macs = {mac.name: mac for mac in rack.macs}
    found = []
    for rank, (name, first, end) in enumerate(cuts):
        mac, last = macs[name], rank == len(cuts) - 1
        step = workload.stage_s + sum(layer_seconds(a, mac, workload, batch) for a in profile.layers[first:end])
        hop, busy = 0.0, 0.0
        if last:
            step += head_seconds(profile, mac, batch)
            hop = rack.link(name, cuts[0][0]).latency if len(cuts) > 1 else 0.0
        else:
            link = rack.link(name, cuts[rank + 1][0])
            busy = link_busy_seconds(profile, link, workload, batch)
            hop = link.latency + busy
        needed = memory_needed(profile, workload, first, end)
        found.append(Stage(name, first, end, rank == 0, last, *needed, mac.memory, step, hop, busy))
    return tuple(found)


def _bottleneck(stages: tuple[Stage, ...]) -> str:
    places = [(stage.step_s, stage.mac) for stage in stages]
    places += [(one.hop_s, f"{one.mac} -> {other.mac}") for one, other in pairwise(stages)]
    return max(places, key=lambda place: place[0])[1]
