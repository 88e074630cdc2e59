"""Finds, checks and profiles models in a process of its own while Ray starts, and chooses the parsers of their answers:
that imports mlx-lm and with it torch, which takes seconds and hundreds of megabytes that the command line has no other
use for.

    Check(models) --> python -m ...model_check MODEL ... --pickle: Looked, or one sentence--> found(), looked()
"""

import glob
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pomarium.cluster.placement.profile import Profiles, read_profiles
from pomarium.cluster.replica.parsers import NO_PARSERS, Parsers, choose
from pomarium.worker.errors import CheckpointError, PomariumError, UnsupportedError

if TYPE_CHECKING:
    from pomarium.worker.models.checkpoint import Checkpoint

FAULTY = 3
EACH = "--each"
"""First on the command line of this process: faults of one model do not end it, and the machine's room is told."""
EMBEDDED = ""
"""Stands for the embedded model on the command line of this process."""


@dataclass(frozen=True)
class Found:
    """A model on this machine's disk, what it costs, and what reads its answers unless the user says otherwise."""

    folder: Path
    profiles: Profiles
    parsers: Parsers = NO_PARSERS


@dataclass(frozen=True)
class Room:
    """What this machine has for models now. memory: bytes. dense: weights become float32, as on a CPU."""

    memory: int
    dense: bool


@dataclass(frozen=True)
class Looked:
    """What was found of each model: of one that is faulty a sentence. room: None unless each was asked for."""

    found: tuple[Found | str, ...]
    room: Room | None


class Check:
    """A running check of models, each a folder, a file, an id, or None for the embedded one. `each`: go on after the
    first that is faulty."""

    def __init__(self, models: Sequence[str | None], each: bool = False) -> None:
        sources = [model or EMBEDDED for model in models]
        command = [sys.executable, "-m", "pomarium.cluster.replica.model_check", *[EACH] * each, *sources]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def found(self) -> list[Found]:
        """Wait for the end of the check: the models, in order. Raises as `looked`, and for each fault."""
        found = []
        for one in self.looked().found:
            if isinstance(one, str):
                raise CheckpointError(one)
            found.append(one)
        return found

    def looked(self) -> Looked:
        """Wait for the end of the check.

        Raises:
            CheckpointError: with the first fault's sentence.
            RuntimeError: the check itself failed; its traceback went to stderr.
        """
        answer, _ = self._process.communicate()
        if self._process.returncode == FAULTY:
            raise CheckpointError(answer.decode())
        if self._process.returncode:
            raise RuntimeError(f"the check of the models ended with code {self._process.returncode}")
        looked: Looked = pickle.loads(answer)
        return looked

    def abandon(self) -> None:
        """End the check, whatever it would have said."""
        self._process.kill()
        self._process.wait()


def main(arguments: Sequence[str]) -> int:
    """Write the pickled Looked: 0, or the first fault's sentence: FAULTY."""
    from pomarium.worker import settings
    from pomarium.worker.models import chat_facts
    from pomarium.worker.models.checkpoint import inspect
    from pomarium.worker.models.resolve import resolve

    each, models = arguments[:1] == [EACH], [word for word in arguments if word != EACH]
    found: list[Found | str] = []
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print; stdout is for the answer
    try:
        values = settings.load(os.environ)
        for model in models:
            try:
                folder = resolve(
                    None if model == EMBEDDED else model,
                    use_modelscope=values.use_modelscope,
                    modelscope_cache=values.modelscope_cache,
                )
                checkpoint = inspect(folder)
                if not values.use_mlx:
                    _check_for_vllm(checkpoint, model or "the embedded model")
                parsers = choose(chat_facts.read(folder, checkpoint.model_type))
                found.append(Found(folder, read_profiles(str(folder)), parsers))
            except PomariumError as error:
                if not each:
                    raise
                found.append(str(error))
        looked = Looked(tuple(found), room_now(os.environ) if each else None)
    except PomariumError as e:
        answer.write(str(e).encode())
        answer.flush()
        return FAULTY
    pickle.dump(looked, answer)
    answer.flush()
    return 0


def room_now(environ: Mapping[str, str]) -> Room:
    """Of this machine beside what runs there. Raises SettingsError."""
    from pomarium.cluster.rack.machine_facts import model_memory
    from pomarium.worker import device, memory, settings

    where = device.detect(settings.load(environ))
    now = memory.snapshot(where, environ)
    free = max(0, now.available - now.reserve)
    limit = memory.machine_limit(environ)
    return Room(min(model_memory(limit, environ), free), where.kind is settings.DeviceKind.CPU)


def _check_for_vllm(checkpoint: "Checkpoint", model: str) -> None:
    """Raises UnsupportedError for what vLLM's own backend does not read."""
    if checkpoint.quantisation is not None:
        raise UnsupportedError(
            f"VLLM_METAL_USE_MLX=0 serves with vLLM's CPU backend, which does not read MLX's quantised weights "
            f"({model}): name a dense checkpoint, or set VLLM_METAL_USE_MLX=1."
        )
    if glob.escape(str(checkpoint.path)) != str(checkpoint.path):
        raise UnsupportedError(
            f"VLLM_METAL_USE_MLX=0 serves with vLLM's CPU backend, which takes [, * and ? in {checkpoint.path} for a "
            "pattern of names: rename the folder, or set VLLM_METAL_USE_MLX=1."
        )


if __name__ == "__main__":
    from pomarium.cluster.replica import model_check

    sys.exit(model_check.main(sys.argv[1:]))
