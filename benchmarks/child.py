"""One system in a process of its own: load, warm up, measure, write samples.

engine.py --arguments--> child.py --Samples as JSON--> file
"""

import argparse
import asyncio
import dataclasses
import json
import os
from pathlib import Path

import measure
import probe
from measure import Sample
from prompts import Prompts
from systems import Spec, open_offline, open_streaming, spec_of


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", required=True)
    parser.add_argument("--streams", nargs="+", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    parser.add_argument("--quiet-wait", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    spec, prompts = spec_of(options.system), Prompts(options.model, options.seed)
    samples = asyncio.run(_gap(spec, prompts, options)) if options.parts == ["gap"] else _batch(spec, prompts, options)
    print("\n".join(f"  {sample}" for sample in samples), flush=True)
    options.out.write_text(json.dumps([dataclasses.asdict(sample) for sample in samples]))


def _batch(spec: Spec, prompts: Prompts, options: argparse.Namespace) -> list[Sample]:
    samples: list[Sample] = []
    with open_offline(spec, options.model) as system:
        measure.warm_up(system, prompts)
        for streams in options.streams if "throughput" in options.parts else ():
            measure.wait_for_quiet(options.quiet_wait)
            samples += measure.throughput(system, prompts, streams, options.output_tokens)
        if "first-token" in options.parts:
            measure.wait_for_quiet(options.quiet_wait)
            samples += measure.first_token(system, prompts)
        if "memory" in options.parts:
            samples.append(Sample("memory/peak", probe.peak_above_start(Path(os.environ[probe.VARIABLE]))))
    return samples


async def _gap(spec: Spec, prompts: Prompts, options: argparse.Namespace) -> list[Sample]:
    with open_streaming(spec, options.model) as system:
        async for _ in system.stream(prompts.make(measure.PROMPT_TOKENS), measure.WARM_UP_OUTPUT):
            pass
        measure.wait_for_quiet(options.quiet_wait)
        return await measure.gaps(system, prompts, options.output_tokens)


if __name__ == "__main__":
    main()
