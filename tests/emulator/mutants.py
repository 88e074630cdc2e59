"""Plants faults in every kernel and counts those that its cases see on the emulator. `make mutants`.

    kernels/cases --Noted--> cases of each kernel --+
    kernels/metal/*.metal --mutate.py--> mutants ---+--EmulatedLauncher, three orders--> killed, or survived
                                                    table, and survivors beside survivors.txt, which explains them

    PYTHONPATH=tests python -m emulator.mutants [--kernel NAME ...] [--jobs N] [--list]

A mutant is killed if the front end or the compiler refuses it, if the emulator stops it, or if a result is out of the
case's bound. The exit status is 1 if a survivor is not explained or an explanation explains nothing.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
from emulator.build import CompileError
from emulator.frontend import NotMetalError
from emulator.inline import InlineSource
from emulator.launcher import EmulatedLauncher
from emulator.mutate import Mutant, mutants
from emulator.run import KernelError, Order

from pomarium.kernels.cases.case import Case
from pomarium.kernels.check import all_cases
from pomarium.kernels.launch import KernelSource, Launch, Launcher

EXPLANATIONS = Path(__file__).with_name("survivors.txt")
MOST_SECONDS = 20
UNCHANGED = "none"

_KILLERS = {NotMetalError: "front end", CompileError: "front end", KernelError: "emulator"}
_SURVIVED = "survived"


Key = tuple[str, str, str]
"""Of a mutant in survivors.txt: its head, the line before and the line after. Line numbers change too often."""


def key_of(kernel: str, mutant: Mutant) -> Key:
    """Kernel and operator, and which of them where several mutants read the same."""
    place = f" ({mutant.place})" if mutant.place > 1 else ""
    return f"{kernel}: {mutant.operator}{place}", mutant.before, mutant.after


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. by: "front end", "emulator", "result" or "survived"."""

    kernel: str
    mutant: Mutant
    by: str

    @property
    def key(self) -> Key:
        """As in survivors.txt."""
        return key_of(self.kernel, self.mutant)


class Noted:
    """A launcher that computes nothing and notes which kernels are launched, and with how many threads in all."""

    def __init__(self) -> None:
        self.sources: dict[str, KernelSource] = {}
        self.threads = 0

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        self.sources[source.name] = source
        self.threads += math.prod(launch.grid)
        return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs]


@dataclass(frozen=True)
class Replaced:
    """Launches another body instead of one kernel's."""

    launcher: Launcher
    kernel: str
    body: str

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        if source.name == self.kernel:
            source = InlineSource(source.name, source.inputs, source.outputs, source.in_place, self.body)
        return self.launcher.launch(source, launch)


@cache
def _cases() -> dict[str, tuple[KernelSource, list[Case]]]:
    """By kernel: what it is, and the cases that launch it, those of the fewest threads first."""
    noted: list[tuple[Case, Noted]] = []
    for case in all_cases():
        noted.append((case, Noted()))
        case.run(noted[-1][1])
    found: dict[str, tuple[KernelSource, list[Case]]] = {}
    for case, notes in sorted(noted, key=lambda pair: pair[1].threads):
        for name, source in notes.sources.items():
            found.setdefault(name, (source, []))[1].append(case)
    return found


@cache
def _launchers() -> tuple[EmulatedLauncher, ...]:
    return tuple(EmulatedLauncher(order, most_seconds=MOST_SECONDS) for order in Order)


def judge(kernel: str, mutant: Mutant) -> Verdict:
    """Run a mutant through its kernel's cases."""
    for case in _cases()[kernel][1]:
        for launcher in _launchers():
            try:
                error = case.error(case.run(Replaced(launcher, kernel, mutant.text)))
            except tuple(_KILLERS) as seen:
                return Verdict(kernel, mutant, _KILLERS[type(seen)])
            if not error <= case.bound:
                return Verdict(kernel, mutant, "result")
    return Verdict(kernel, mutant, _SURVIVED)


def _keep_in(folder: str) -> None:
    """Compile into `folder` in this process."""
    os.environ["XDG_CACHE_HOME"] = folder


def planned(kernels: Iterable[str]) -> list[tuple[str, Mutant]]:
    """The mutants of these kernels; each kernel itself first, as a mutant without a change."""
    plan = []
    for kernel in kernels:
        source = _cases()[kernel][0]
        plan.append((kernel, Mutant(UNCHANGED, 1, "", "", source.text)))
        const_inputs = tuple(name for name in source.inputs if name not in source.in_place)
        plan += [(kernel, mutant) for mutant in mutants(source.text, const_inputs)]
    return plan


def explanations() -> dict[Key, str]:
    """Why survivors survive.

    Raises:
        ValueError: the file is not as its head says.
    """
    found: dict[Key, str] = {}
    lines = [line for line in EXPLANATIONS.read_text().splitlines() if line and not line.startswith("#")]
    for first in range(0, len(lines), 4):
        head, before, after, reason = (line.strip() for line in lines[first : first + 4])
        if not (before.startswith("- ") and after.startswith("+ ") and reason.startswith("= ")):
            raise ValueError(f"{EXPLANATIONS.name}: no entry begins with {head!r}")
        found[head, before[2:], after[2:]] = reason[2:]
    return found


def _kernel_of(verdict: Verdict) -> str:
    return verdict.kernel


def _operator_of(verdict: Verdict) -> str:
    return verdict.mutant.operator


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: kernels, and operators."""
    known = explanations()
    lines = []
    for title, name_of in (("kernel", _kernel_of), ("operator", _operator_of)):
        lines += [f"\n| {title} | mutants | front end | emulator | result | explained | unexplained | killed |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for name in [*dict.fromkeys(map(name_of, verdicts)), None]:
            own = [verdict for verdict in verdicts if name is None or name_of(verdict) == name]
            by = Counter(verdict.by for verdict in own)
            explained = sum(verdict.by == _SURVIVED and verdict.key in known for verdict in own)
            rate = 100 * (len(own) - by[_SURVIVED]) / len(own)
            counts = [by["front end"], by["emulator"], by["result"], explained, by[_SURVIVED] - explained]
            lines.append(f"| {name or 'all'} | {len(own)} | {' | '.join(map(str, counts))} | {rate:.1f}% |")
    return "\n".join(lines)


def survivors(verdicts: Sequence[Verdict]) -> tuple[str, bool]:
    """The list of survivors and of explanations without one; and whether something is left to be explained."""
    known = explanations()
    judged = {verdict.key: verdict for verdict in verdicts}
    lines, open_ends = [], False
    for verdict in verdicts:
        if verdict.by != _SURVIVED:
            continue
        reason = known.get(verdict.key)
        open_ends = open_ends or reason is None
        mutant = verdict.mutant
        lines.append(f"{verdict.key[0]}  # line {mutant.line}")
        lines.append(f"- {mutant.before}\n+ {mutant.after}\n= {reason or 'NOT EXPLAINED'}")
    for key in known:
        if key in judged and judged[key].by != _SURVIVED:
            open_ends = True
            lines.append(f"explained, but killed by the {judged[key].by}: {' | '.join(key)}")
    return "\n".join(lines), open_ends


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Plant faults in every kernel, and count those that are seen.")
    parser.add_argument("--kernel", action="append", choices=sorted(_cases()), help="only this one; repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    options = parser.parse_args()
    plan = planned(options.kernel or _cases())
    if options.list:
        for kernel, mutant in plan:
            print(f"{kernel}:{mutant.line}: {mutant.operator}\n- {mutant.before}\n+ {mutant.after}")
        print(len(plan), "mutants")
        return 0
    # Nobody compiles a mutant twice: its objects go with this run.
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, context, _keep_in, (folder,)) as pool:
            verdicts = []
            for number, verdict in enumerate(pool.map(judge, *zip(*plan, strict=True)), 1):
                if verdict.mutant.operator == UNCHANGED:
                    if verdict.by != _SURVIVED:
                        parser.error(f"{verdict.kernel} fails its cases without any change: {verdict.by}")
                    continue
                verdicts.append(verdict)
                if number % 50 == 0:
                    print(f"{number} of {len(plan)}", flush=True)
    listed, open_ends = survivors(verdicts)
    print(f"{table(verdicts)}\n\n{listed}")
    return int(open_ends)


if __name__ == "__main__":
    raise SystemExit(main())
