"""`pomarium plan`: how a model would be laid over the rack, and what to expect of it. Starts nothing, loads no weight.

rack.yaml --inventory, placement_inputs--> Rack --+
MODEL --placement.profile--> Profile ------------+--> placement.place --> table, or the refusal
options --> Workload ----------------------------+
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pomarium.cluster.machine.units import format_seconds, format_size
from pomarium.cluster.placement.model import Plan, Rack, Refusal, Workload
from pomarium.cluster.placement.place import Objective, longest_context, place
from pomarium.cluster.rack import inventory, placement_inputs
from pomarium.worker.errors import InsufficientMemoryError, SettingsError

STEP_TOKENS = 2048
STEP_SEQUENCES = 256
"""What a step holds at most under vLLM's defaults: tokens, and sequences to sample."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="show which layers of a model would run on which Mac",
        description="Reads the model's headers and rack.yaml, and prints the stages with memory per Mac, predicted "
        "step times and the bottleneck. Exits 1, saying how much memory is missing where, if the model does not fit.",
        epilog="Times are estimates (docs/placement.md); measured bandwidth and flops in rack.yaml make them better. "
        "An id of Hugging Face or ModelScope is fetched as for `pomarium serve`.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a GGUF file, an id, or a model's name in rack.yaml, whose stages, context and streams are then "
        "the defaults; without it the embedded SmolLM2-135M-Instruct",
    )
    parser.add_argument("--rack", type=Path, required=True, metavar="FILE", help="the rack's description (rack.yaml)")
    parser.add_argument("--stages", metavar="N", help="Macs per replica, or auto (default: auto)")
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="longest prompt plus answer (default: the model's)"
    )
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default: 1)")
    parser.add_argument(
        "--objective",
        type=Objective,
        choices=list(Objective),
        help="what the plan is to be good at: one request's speed, or all requests' together (default: latency; "
        "throughput if --stages and a --concurrency of more than 1 are given)",
    )
    parser.add_argument(
        "--prompt-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="prompt tokens to compute / all tokens, from 0 to under 1; 0.75 for long prompts (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan: 0. Raises PomariumError for a bad file or option, and if the model does not fit."""
    from pomarium.cluster.placement.profile import read_profile

    rack_file = inventory.load(args.rack)
    rack = placement_inputs.rack_of(rack_file)
    entry = next((m for m in rack_file.models if m.name == args.model), None)
    stages = _stages(args.stages) if args.stages is not None else (entry.stages if entry else None)
    profile = read_profile(entry.source if entry else args.model)
    context = args.context or (entry.context if entry else None) or profile.longest_context
    if context is None:
        raise SettingsError(f"{profile.model.name} does not say how long its context is: give --context.")
    workload = Workload(
        context=_at_least_one("--context", args.context, context),
        streams=_at_least_one("--concurrency", args.concurrency, entry.streams if entry else 1),
        prompt_share=_share(args.prompt_share),
        chunk=STEP_TOKENS,
        stage_bytes=profile.stage_bytes(rows=STEP_TOKENS, sampled=STEP_SEQUENCES),
    )
    found = place(rack, profile.model, workload, stages=stages, objective=args.objective)
    chips = {mac.name: mac.chip or "-" for mac in rack_file.macs}
    if args.json:
        print(json.dumps(_facts(found, workload, chips), indent=2))
        return 0 if isinstance(found, Plan) else 1
    if isinstance(found, Refusal):
        context = longest_context(rack, profile.model, workload, stages) if found.missing else 0
        fits = f" (a context of {context} tokens would fit)" if context else ""
        raise InsufficientMemoryError(f"{found.reason.rstrip('.')}{fits}.")
    print(report(found, profile.model.name, rack, workload, chips))
    return 0


def report(plan: Plan, model: str, rack: Rack, workload: Workload, chips: dict[str, str]) -> str:
    """The plan as text: a table of the stages, then what is predicted."""
    rows: list[tuple[str, ...]] = [
        ("Mac", "chip", "layers", "weights", "KV cache", "used", "of", "step", "hop", "busy")
    ]
    cohorts = workload.cohorts(len(plan.stages))
    for stage in plan.stages:
        ends = ("embedding + " if stage.has_embedding else "") + f"{stage.first}-{stage.end - 1}"
        rows.append((
            stage.mac,
            chips[stage.mac],
            ends + (" + head" if stage.has_head else ""),
            *map(format_size, (stage.weight_bytes, stage.kv_bytes, stage.used, stage.memory)),
            format_seconds(stage.step_s),
            format_seconds(stage.hop_s) if stage.hop_s else "-",
            f"{cohorts * stage.step_s / plan.round_s:.0%}",
        ))  # fmt: skip
    unused = [mac.name for mac in rack.macs if mac.name not in {stage.mac for stage in plan.stages}]
    lines = [
        f"{model}: {_count(len(plan.stages), 'stage')}, {workload.context} tokens of context, "
        f"{_count(workload.streams, 'request')} at once",
        "",
        *_aligned(rows),
        "",
        f"one request   {format_seconds(plan.token_s)} per token, {1 / plan.token_s:.1f} tokens/s",
        f"all requests  {format_seconds(plan.round_s)} per round of {workload.streams} in {_count(cohorts, 'cohort')}, "
        f"{plan.tokens_per_s:.1f} tokens/s",
        f"bottleneck    {plan.bottleneck}",
    ]
    return "\n".join(lines + ([f"not used      {', '.join(unused)}"] if unused else []))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width: words to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if place < 3 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _facts(found: Plan | Refusal, workload: Workload, chips: dict[str, str]) -> dict[str, object]:
    facts_of: dict[str, object] = {"workload": asdict(workload)}
    if isinstance(found, Refusal):
        return facts_of | {"refusal": asdict(found)}
    stages = [asdict(stage) | {"chip": chips[stage.mac], "used_bytes": stage.used} for stage in found.stages]
    return facts_of | {"plan": asdict(found) | {"stages": stages}}


def _stages(text: str) -> int | None:
    try:
        return inventory.stages_of(text)
    except ValueError as error:
        raise SettingsError(f"--stages: {error}.") from None


def _at_least_one(option: str, given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise SettingsError(f"{option} {given} is too few: give at least 1.")
    return default if given is None else given


def _share(value: float) -> float:
    if not 0 <= value < 1:
        raise SettingsError(f"--prompt-share {value} is not from 0 to under 1.")
    return value
