"""vLLM's engine over the stages of a rack, as `pomarium selftest --stages` compares it with mlx-lm.

Runs in the process of the command line, without an EngineCore process: one start less.
"""

import os
from collections.abc import Sequence
from typing import Any

import ray

from pomarium.cluster.executor.ask import SHARE_MACS
from pomarium.cluster.executor.member import Member
from pomarium.cluster.selftest.tokens import greedy
from pomarium.worker.models.embedded import path
from pomarium.worker.models.paged import PagedModel

CONTEXT = 256


class StagedEngine:
    """An engine of the embedded model.

    Attributes:
        where: its stages, for the report.
    """

    def __init__(self, stages: int, share_macs: bool) -> None:
        """Starts the workers. Raises PomariumError if there are too few Macs."""
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        from vllm import LLM

        self._llm = LLM(
            str(path()),
            pipeline_parallel_size=stages,
            distributed_executor_backend="ray",
            max_model_len=CONTEXT,
            additional_config={SHARE_MACS: share_macs},
            disable_log_stats=True,
        )
        self._executor: Any = self._llm.llm_engine.engine_core.engine_core.model_executor
        self.where = "; ".join(_part(worker.member) for worker in self._executor.workers)

    def generate(self, model: PagedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """See worker.selftest.Generate; `model` is the reference's and not used."""
        return greedy(self._llm, prompts, new_tokens)

    def close(self) -> None:
        """End the workers, and the connection to Ray, which prints their logs."""
        self._executor.shutdown()
        ray.shutdown()


def _part(member: Member) -> str:
    layers = "all" if member.layers is None else f"{member.layers[0]}-{member.layers[1] - 1}"
    return f"layers {layers} on {member.mac}"
