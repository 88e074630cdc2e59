"""Finds, checks and profiles models in a process of its own while Ray starts, and chooses the parsers of their answers:
that imports mlx-lm and with it torch, which takes seconds and hundreds of megabytes that the command line has no other
use for.

    Check(models) --> python -m ...model_check MODEL ... --pickle: Found ... or one sentence--> found()
"""

import glob
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pomarium.cluster.placement.profile import Profiles, read_profiles
from pomarium.cluster.replica.parsers import NO_PARSERS, Parsers, choose
from pomarium.worker.errors import CheckpointError, PomariumError, UnsupportedError

if TYPE_CHECKING:
    from pomarium.worker.models.checkpoint import Checkpoint

FAULTY = 3
EMBEDDED = ""
"""Stands for the embedded model on the command line of this process."""


@dataclass(frozen=True)
class Found:
    """A model on this machine's disk, what it costs, and what reads its answers unless the user says otherwise."""

    folder: Path
    profiles: Profiles
    parsers: Parsers = NO_PARSERS


class Check:
    """A running check of models, each a folder, a file, an id, or None for the embedded one."""

    def __init__(self, models: Sequence[str | None]) -> None:
        sources = [model or EMBEDDED for model in models]
        command = [sys.executable, "-m", "pomarium.cluster.replica.model_check", *sources]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def found(self) -> list[Found]:
        """Wait for the end of the check: the models, in order.

        Raises:
            CheckpointError: with the first fault's sentence.
            RuntimeError: the check itself failed; its traceback went to stderr.
        """
        answer, _ = self._process.communicate()
        if self._process.returncode == FAULTY:
            raise CheckpointError(answer.decode())
        if self._process.returncode:
            raise RuntimeError(f"the check of the models ended with code {self._process.returncode}")
        found: list[Found] = pickle.loads(answer)
        return found

    def abandon(self) -> None:
        """End the check, whatever it would have said."""
        self._process.kill()
        self._process.wait()


def main(models: Sequence[str]) -> int:
    """Write the pickled list of what was found: 0, or the first fault's sentence: FAULTY."""
    from pomarium.worker import settings
    from pomarium.worker.models import chat_facts
    from pomarium.worker.models.checkpoint import inspect
    from pomarium.worker.models.resolve import resolve

    found = []
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print; stdout is for the answer
    try:
        values = settings.load(os.environ)
        for model in models:
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
    except PomariumError as e:
        answer.write(str(e).encode())
        answer.flush()
        return FAULTY
    pickle.dump(found, answer)
    answer.flush()
    return 0


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
