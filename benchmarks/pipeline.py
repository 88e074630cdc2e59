"""What stages of a pipeline do with their time: real ones, each held to one core, and ones that sleep.

    stages:   1 stage on 1 core beside 2 stages on 2, the embedded model   --> tokens/s; computing, handing on, waiting
    sleeping: steps that sleep, over real links with a delay, vLLM's scheduler beside ours --> idle share, tokens/s,
              beside what the virtual clock (virtual_stages.py) says of the same case
    picture:  some steps of the two real stages as SVG

Every engine and every stage is a process of its own, in one embedded Ray; engines take turns, round by round. This
process is the client and takes token ids. Where there are no cores but those of the stages, engines and client share
them. Figures are of the time in which all streams run: from the last one's first token to the first one's last.

    python benchmarks/pipeline.py [--parts stages sleeping] [--streams 1 8 16] [--tokens 64] [--rounds 1]
"""

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import intervals
import psutil
import timeline
from intervals import COMPUTE, HANDOFF, SLEEP, WAITING, Interval, Window
from measure import Load

if TYPE_CHECKING:
    from virtual_stages import Pipeline
    from vllm import LLM

HERE = Path(__file__).resolve().parent
PARTS = ("stages", "sleeping")
STAGES = (1, 2)
SLEEPING_STAGES = (2, 4)
SLEEPING_STREAMS = (4, 16)
FIXED_MS, TOKEN_MS = 12.0, 1.0
LINKS_MS = (0.0, 0.3, 1.0)
VIRTUAL_ENGINE_MS = 1.0
STOCK, OURS = "vLLM", "ours"
SCHEDULERS = {STOCK: "vllm.v1.core.sched.async_scheduler.AsyncScheduler", OURS: None}
PROMPT_TOKENS, WARM_TOKENS = 32, 4
PICTURE_STREAMS, PICTURE_STEPS = 8, 12
ENDING_S = 10.0


@dataclass(frozen=True)
class Run:
    """One load on one engine.

    Attributes:
        rate: tokens per second. window: to which rate, shares and `sleep` belong.
        stages: what each did.
        stage_cores, engine_cores, others: cores that each stage, that engine, client and Ray, and that other programs
            used during the whole load.
    """

    rate: float
    window: Window
    stages: tuple[tuple[Interval, ...], ...]
    stage_cores: tuple[float, ...]
    engine_cores: float
    others: float

    def share(self, stage: int, kind: str) -> float:
        """Of the stage's time."""
        return intervals.share(self.stages[stage], kind, self.window)

    def idle(self, kind: str) -> float:
        """Share of the time that is not of `kind`, mean of the stages."""
        return 1 - statistics.mean(self.share(stage, kind) for stage in range(len(self.stages)))


def main() -> None:
    """See the module."""
    options = _options()
    began = os.getloadavg()[0]
    with environment():
        parts = []
        if "stages" in options.parts:
            parts.append(real(options))
        if "sleeping" in options.parts:
            parts.append(sleeping(options))
    load = f"{os.cpu_count()} cores; load average {began:.1f} before and {os.getloadavg()[0]:.1f} after."
    text = "\n\n".join([load, *parts]) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Of this process and all that it starts: one BLAS thread each, and this folder's workers can be imported."""
    folders = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    with tempfile.TemporaryDirectory(prefix="pmp", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        os.environ.pop("RAY_ADDRESS", None)
        yield


@contextlib.contextmanager
def rack(workers: int) -> Iterator[contextlib.ExitStack]:
    """An embedded Ray with room for so many; engines that are put on the stack end before it does."""
    import ray

    from pomarium.cluster.executor import ray_connection

    ray_connection.start_embedded(workers)
    try:
        with contextlib.ExitStack() as engines:
            yield engines
    finally:
        left = psutil.Process().children(recursive=True)
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)  # set by our platform for engines' processes
        _, alive = psutil.wait_procs(left, ENDING_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def start(engines: contextlib.ExitStack, model: str, stages: int, worker: str, **arguments: Any) -> "LLM":
    """An engine in a process of its own, until the stack ends."""
    from vllm import LLM

    _say(f"{stages} stage(s) of {worker}, {arguments.get('scheduler_cls') or 'our scheduler'} ...")
    llm = LLM(
        model,
        worker_cls=worker,
        pipeline_parallel_size=stages,
        distributed_executor_backend="ray",
        additional_config={"share_macs": True},
        max_model_len=512,
        max_num_seqs=32,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **arguments,
    )
    engines.callback(llm.llm_engine.engine_core.shutdown)
    return llm


def play(llm: "LLM", streams: int, tokens: int, seed: int = 0) -> Run:
    """So many streams at once, greedily, with prompts of their own."""
    before = llm.collective_rpc("take")
    load, began = Load(), time.monotonic()
    arrivals = _arrivals(llm, streams, tokens, random.Random(seed))
    seconds, own, others = time.monotonic() - began, load.own(), load.others()
    after = llm.collective_rpc("take")
    stages = tuple(tuple(Interval(*fields) for fields in taken) for taken, _ in after)
    used = tuple((new - old) / seconds for (_, new), (_, old) in zip(after, before, strict=True))
    window = intervals.window(arrivals)
    rate = intervals.rate(arrivals, window)
    return Run(rate, window, stages, used, max(0.0, own / seconds - sum(used)), others)


def _arrivals(llm: "LLM", streams: int, tokens: int, source: random.Random) -> list[list[float]]:
    """When each token of each stream reached this process."""
    from vllm import SamplingParams

    engine, params = llm.llm_engine, SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
    arrivals: dict[str, list[float]] = {}
    for _ in range(streams):
        name = f"{source.random()} {len(arrivals)}"
        arrivals[name] = []
        engine.add_request(name, {"prompt_token_ids": source.choices(range(100, 5000), k=PROMPT_TOKENS)}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            times = arrivals[output.request_id]
            times += [time.monotonic()] * (len(output.outputs[0].token_ids) - len(times))
    return list(arrivals.values())


def real(options: argparse.Namespace) -> str:
    """Both numbers of stages, in turns; writes the picture."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(STAGES):
        raise SystemExit(f"{max(STAGES)} stages need a core each: this process may use {len(cores)}")
    rest = cores[max(STAGES) :]
    if rest:
        os.sched_setaffinity(0, rest)
    try:
        runs = _real_runs(options, cores)
    finally:
        os.sched_setaffinity(0, cores)
    streams = PICTURE_STREAMS if PICTURE_STREAMS in options.streams else max(options.streams)
    _draw(options.picture, runs[streams, max(STAGES)][-1], streams)
    held = ", ".join(f"stage {rank} to core {core}" for rank, core in enumerate(cores[: max(STAGES)]))
    others = f"cores {', '.join(map(str, rest))}" if rest else "any core, the stages' own: there is no other"
    return (
        f"Real stages: {held}; one stage to core {cores[0]}; engine, client and Ray to {others}. "
        f"{options.tokens} tokens; median of {options.rounds} round(s) in turns.\n\n"
        f"{throughput_table(runs, options.streams)}\n\n{share_table(runs, options.streams)}"
    )


Runs = dict[tuple[int, int], list[Run]]
"""By streams and stages, a run for each round."""


def _real_runs(options: argparse.Namespace, cores: list[int]) -> Runs:
    runs: Runs = {(streams, stages): [] for streams in options.streams for stages in STAGES}
    with rack(sum(STAGES)) as engines:
        llms = {}
        for stages in STAGES:
            llms[stages] = start(
                engines, _model(options), stages, "stage_recorder.RecordingWorker", kv_cache_memory_bytes=256 << 20
            )
            llms[stages].collective_rpc("hold_to_cores", args=(cores,))
        for llm in llms.values():
            for streams in options.streams:
                play(llm, streams, WARM_TOKENS)
        for turn in range(options.rounds):
            for streams in options.streams:
                for stages, llm in llms.items():
                    run = play(llm, streams, options.tokens, turn)
                    runs[streams, stages].append(run)
                    _say(f"round {turn + 1}, {streams} streams, {stages} stage(s): {run.rate:.1f} tokens/s")
    return runs


def _draw(picture: Path | None, run: Run, streams: int) -> None:
    if picture is None:
        return
    steps = intervals.steps_between(run.stages, PICTURE_STEPS)
    title = f"{len(steps)} steps over {len(run.stages)} stages, each held to one core, {streams} streams"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(timeline.svg(run.stages, steps, title))


def throughput_table(runs: Runs, streams: Sequence[int]) -> str:
    """A row for each number of streams and of stages. The ratio is of runs that followed one another."""
    rows = []
    for count in streams:
        for stages in STAGES:
            found = runs[count, stages]
            rates = [run.rate for run in found]
            ratios = [run.rate / base.rate for run, base in zip(found, runs[count, STAGES[0]], strict=True)]
            spread = f" ({min(rates):.1f}–{max(rates):.1f})" if len(rates) > 1 else ""
            engine, others = _median(r.engine_cores for r in found), max(r.others for r in found)
            figures = [f"{_median(rates):.1f}{spread}", f"{_median(ratios):.2f}x", f"{engine:.2f}", f"{others:.2f}"]
            rows.append([str(count), str(stages), *figures])
    header = ["streams", "stages", "tokens/s", "to one stage", "cores of engine, client, Ray", "others' cores, at most"]
    return _table(header, rows)


def share_table(runs: Runs, streams: Sequence[int]) -> str:
    """A row for each stage: where its time went, and how much of its core it used."""
    rows = []
    for count in streams:
        for stages in STAGES:
            found = runs[count, stages]
            for rank in range(stages):
                shares = [_median(run.share(rank, kind) for run in found) for kind in (COMPUTE, HANDOFF, WAITING)]
                shares += [max(0.0, 1 - sum(shares)), _median(run.stage_cores[rank] for run in found)]
                rows.append([str(count), f"{rank + 1} of {stages}", *(f"{100 * part:.1f}%" for part in shares)])
    header = ["streams", "stage", "computes", "hands on", "waits for its neighbour", "has no step", "of its core"]
    return _table(header, rows)


def sleeping(options: argparse.Namespace) -> str:
    """vLLM's scheduler and ours, in turns, at each number of stages; then the same on the virtual clock."""
    rows = []
    for stages in options.sleeping_stages:
        found = _sleeping_runs(options, stages)
        exact = _virtual(options, stages)
        for link, streams in _cases():
            pair = [found[link, streams, name] for name in (STOCK, OURS)]
            idle = [_idle(runs) for runs in pair]
            rates = [_median(run.rate for run in runs) for runs in pair]
            gain = _median(ours.rate / stock.rate for stock, ours in zip(*pair, strict=True))
            others = max(run.others for runs in pair for run in runs)
            measured = [*idle, *(f"{value:.1f}" for value in rates), f"{gain:.2f}x", f"{others:.2f}"]
            rows.append([str(stages), f"{link:g}", str(streams), *measured, *exact[link, streams]])
    header = ["stages", "link, ms", "streams", "idle: vLLM", "ours", "tokens/s: vLLM", "ours", "gain", "others' cores"]
    header += ["virtual clock: idle, vLLM", "ours", "gain"]
    return (
        f"Stages that sleep {FIXED_MS:g} + {TOKEN_MS:g} x tokens ms for a step, processes of their own over "
        "real links, each message delayed by the link's time, engine and client on any core. "
        f"{options.tokens} tokens; median of {options.rounds} round(s) in turns. Idle, mean of the stages: all but "
        "sleep / all but computing, to which belongs what a step costs in Python. The virtual clock counts "
        f"{VIRTUAL_ENGINE_MS:g} ms of engine for each step, and the link's time also between engine and stages.\n\n"
        + _table(header, rows)
    )


def _idle(runs: Sequence[Run]) -> str:
    return " / ".join(f"{100 * _median(run.idle(kind) for run in runs):.1f}%" for kind in (SLEEP, COMPUTE))


def _cases() -> list[tuple[float, int]]:
    return [(link, streams) for link in LINKS_MS for streams in SLEEPING_STREAMS]


def _sleeping_runs(options: argparse.Namespace, stages: int) -> dict[tuple[float, int, str], list[Run]]:
    runs: dict[tuple[float, int, str], list[Run]] = {}
    with rack(stages * len(SCHEDULERS)) as engines:
        llms = {
            name: start(engines, _model(options), stages, "sleeping_stage.SleepingStage", scheduler_cls=scheduler)
            for name, scheduler in SCHEDULERS.items()
        }
        for llm in llms.values():
            play(llm, max(SLEEPING_STREAMS), WARM_TOKENS)
        for turn in range(options.rounds):
            for link, streams in _cases():
                for name, llm in llms.items():
                    llm.collective_rpc("set_pace", args=(FIXED_MS, TOKEN_MS, link))
                    run = play(llm, streams, options.tokens, turn)
                    runs.setdefault((link, streams, name), []).append(run)
                    what = f"{stages} sleeping stages, link {link:g} ms, {streams} streams, {name}"
                    _say(f"round {turn + 1}, {what}: {run.rate:.1f} tokens/s, idle {_idle([run])}")
    return runs


def _virtual(options: argparse.Namespace, stages: int) -> dict[tuple[float, int], list[str]]:
    """Idle share of vLLM's scheduler and of ours, and the gain, by case."""
    from virtual_stages import Arrival, Costs, engine, plain
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    def figures(pipeline: "Pipeline", link: float, streams: int) -> tuple[float, float]:
        arrivals = [Arrival([7 + index] * PROMPT_TOKENS, plain(options.tokens)) for index in range(streams)]
        played = pipeline.play(arrivals, Costs(FIXED_MS, TOKEN_MS, link, VIRTUAL_ENGINE_MS))
        return statistics.mean(played.idle(played.window())), played.rate(played.window())

    found = {}
    with engine(stages, AsyncScheduler) as stock, engine(stages) as ours:
        for link, streams in _cases():
            (stock_idle, stock_rate), (idle, rate) = (figures(one, link, streams) for one in (stock, ours))
            found[link, streams] = [f"{100 * stock_idle:.1f}%", f"{100 * idle:.1f}%", f"{rate / stock_rate:.2f}x"]
    return found


def _median(values: Any) -> float:
    return float(statistics.median(values))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from report import table

    return table(header, rows)


def _model(options: argparse.Namespace) -> str:
    from pomarium.worker.models import embedded

    return str(options.model or embedded.path())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model (default: the embedded one)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 16], help="of the real stages")
    parser.add_argument("--sleeping-stages", nargs="+", type=int, default=list(SLEEPING_STAGES))
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--picture", type=Path, help="write the timeline to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
