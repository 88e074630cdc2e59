"""How much of a machine's memory a model takes that is loaded on demand, and which of them are served. Pure.

    ModelPlan, Profile --need--> Need: bytes in all, and those of its KV cache, which its engine is then given
    ServePlan, what was found of each model, Room --settled--> the plan of those that can be served; who is left out

An engine that is served by itself takes what it can use of the machine (worker.memory), which leaves nothing for
another. One on demand gets KV_BYTES for K and V, more if one sequence of its greatest length needs more, and less if
all its sequences together cannot use that; --kv-cache-memory-bytes says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pomarium.cluster.machine.units import format_size
from pomarium.cluster.placement.fit import UNSAID_CONTEXT
from pomarium.cluster.placement.model import Workload, memory_needed
from pomarium.cluster.placement.profile import Profile
from pomarium.cluster.replica.model_check import Found, Room
from pomarium.cluster.replica.serve_plan import ModelPlan, ServePlan
from pomarium.worker.errors import CheckpointError, SettingsError

KV_BYTES = 2 << 30
"""Of one model for K and V, where one sequence does not need more."""

PROCESS_BYTES = 3 << 29
"""What an engine's three processes (replica, EngineCore, worker) hold beside the model: vLLM's and torch's code."""

KV_ARGUMENT = "kv_cache_memory_bytes"
"""vLLM's name for the bytes of a KV cache."""


@dataclass(frozen=True)
class Need:
    """Bytes. model: weights and what a step takes. kv: of the KV cache."""

    model: int
    kv: int

    @property
    def all(self) -> int:
        """What the machine has to have."""
        return self.model + self.kv + PROCESS_BYTES


def need(plan: ModelPlan, profile: Profile) -> Need:
    """What an engine of `plan` takes. profile: of its weights as they lie in memory."""
    asked = plan.engine_args.get("max_model_len")
    context = asked if isinstance(asked, int) and asked > 0 else profile.longest_context or UNSAID_CONTEXT
    one = Workload(
        context,
        chunk=plan.step_tokens,
        stage_bytes=profile.stage_bytes(rows=plan.step_tokens, sampled=min(plan.step_tokens, plan.step_requests)),
    )
    layers = len(profile.model.layers)
    weights, kv, overhead = memory_needed(profile.model, one, 0, layers)
    given = plan.engine_args.get(KV_ARGUMENT)
    if isinstance(given, int):
        return Need(weights + overhead, given)
    _, most, _ = memory_needed(profile.model, replace(one, streams=plan.step_requests), 0, layers)
    least = kv + kv // 8  # vLLM pads groups of unlike layers
    return Need(weights + overhead, max(least, min(most, KV_BYTES)))


def settled(
    plan: ServePlan, found: Sequence[Found | str], room: Room
) -> tuple[ServePlan, tuple[Found, ...], tuple[str, ...]]:
    """The plan of the models that can be served, what was found of these, and a line on each that is left out.

    Args:
        found: of each model of the plan; of one that is faulty, and optional, a sentence.

    Raises:
        CheckpointError: no model is left.
        SettingsError: what is pinned does not fit at once.
    """
    pairs = [(model, one) for model, one in zip(plan.models, found, strict=True) if isinstance(one, Found)]
    lines = tuple(
        f"{model.name} is left out: {one}"
        for model, one in zip(plan.models, found, strict=True)
        if isinstance(one, str)
    )
    if not pairs:
        raise CheckpointError(f"No model is left to serve. {' '.join(lines)}")
    kept = tuple(one for _, one in pairs)
    if plan.on_demand is None:
        return replace(plan, models=tuple(model for model, _ in pairs)), kept, lines
    needs = [need(model, one.profiles.dense if room.dense else one.profiles.stored) for model, one in pairs]
    models = tuple(
        replace(model, engine_args={**model.engine_args, KV_ARGUMENT: need.kv})
        for (model, _), need in zip(pairs, needs, strict=True)
    )
    sizes = {model.name: need.all for model, need in zip(models, needs, strict=True)}
    memory = room.memory if plan.on_demand.memory is None else plan.on_demand.memory
    pins = plan.on_demand.pins
    if missing := sorted(pins - set(sizes)):
        raise SettingsError(f"--pin {missing[0]}: no such model is served; there are {', '.join(sizes)}.")
    if (pinned := sum(sizes[name] for name in pins)) > memory:
        raise SettingsError(
            f"--pin: {', '.join(sorted(pins))} take {format_size(pinned)} together, and this machine has "
            f"{format_size(memory)} for models: pin less, or give --max-model-len."
        )
    on_demand = replace(plan.on_demand, memory=memory, sizes=sizes)
    return replace(plan, models=models, on_demand=on_demand), kept, lines
