"""Finds and checks the models in a process of its own while Ray starts: that imports mlx-lm and with it torch, which
takes seconds and hundreds of megabytes that the command line has no other use for.

    Check(models) --> python -m pomarium.cluster.serving.check MODEL ... --JSON: folders or one sentence--> folders()
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pomarium.worker.errors import CheckpointError, PomariumError, UnsupportedError

FAULTY = 3
EMBEDDED = ""
"""Stands for the embedded model on the command line of this process."""


class Check:
    """A running check of models, each a folder, a file, an id, or None for the embedded one."""

    def __init__(self, models: Sequence[str | None]) -> None:
        command = [sys.executable, "-m", "pomarium.cluster.serving.check", *(model or EMBEDDED for model in models)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)

    def folders(self) -> list[Path]:
        """Wait for the end of the check: the models' folders, in order.

        Raises:
            CheckpointError: with the first fault's sentence.
            RuntimeError: the check itself failed; its traceback went to stderr.
        """
        answer, _ = self._process.communicate()
        if self._process.returncode == FAULTY:
            raise CheckpointError(str(json.loads(answer)))
        if self._process.returncode:
            raise RuntimeError(f"the check of the models ended with code {self._process.returncode}")
        return [Path(folder) for folder in json.loads(answer)]

    def abandon(self) -> None:
        """End the check, whatever it would have said."""
        self._process.kill()
        self._process.wait()


def main(models: Sequence[str]) -> int:
    """Print the models' folders as JSON: 0, or the first fault's sentence: FAULTY."""
    from pomarium.worker import settings
    from pomarium.worker.models.checkpoint import inspect
    from pomarium.worker.models.resolve import resolve

    folders = []
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; stdout is for the answer
    try:
        values = settings.load(os.environ)
        for model in models:
            folder = resolve(
                None if model == EMBEDDED else model,
                use_modelscope=values.use_modelscope,
                modelscope_cache=values.modelscope_cache,
            )
            if inspect(folder).quantisation is not None and not values.use_mlx:
                raise UnsupportedError(
                    f"VLLM_METAL_USE_MLX=0 serves with vLLM's CPU backend, which does not read MLX's quantised weights "
                    f"({model or 'the embedded model'}): name a dense checkpoint, or set VLLM_METAL_USE_MLX=1."
                )
            folders.append(str(folder))
    except PomariumError as e:
        print(json.dumps(str(e)), file=answer, flush=True)
        return FAULTY
    print(json.dumps(folders), file=answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
