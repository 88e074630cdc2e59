"""The first step of serving: vLLM's engine with our worker, both in this process, against mlx-lm's tokens.

worker.selftest.run --InProcessEngine.generate--> Report --> rows, then what MLX holds and whether it is wired
"""

import os
from collections.abc import Iterator, Sequence

import mlx.core as mx

from pomarium.cluster.machine.units import format_size
from pomarium.cluster.selftest.tokens import greedy
from pomarium.worker import selftest
from pomarium.worker.models.embedded import path
from pomarium.worker.models.paged import PagedModel
from pomarium.worker.selftest_rows import Begin, Event, fact

CONTEXT, SEQUENCES = 256, 8
"""Small, so that no more memory is asked for than they can use."""


class InProcessEngine:
    """`vllm.LLM` on the embedded model without Ray and without another process, so that MLX can be asked afterwards."""

    def generate(self, model: PagedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """See worker.selftest.Generate; `model` is the reference's and not used."""
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        from pomarium.cluster.executor.lean_import import import_vllm

        import_vllm()
        from vllm import LLM

        self._llm = LLM(str(path()), max_model_len=CONTEXT, max_num_seqs=SEQUENCES, disable_log_stats=True)
        return greedy(self._llm, prompts, new_tokens)


def events() -> Iterator[Event]:
    """Rows of the comparison and of memory."""
    yield Begin("engine")
    engine = InProcessEngine()
    yield from selftest.run(engine.generate).rows("engine")
    yield Begin("memory of the engine")
    yield fact("arrays", f"{format_size(mx.get_active_memory())}, at most {format_size(mx.get_peak_memory())}")
    yield fact("MLX's cache", format_size(mx.get_cache_memory()))
    # It returns the limit that stood; the engine has no more to do. Without Metal there is none.
    wired = mx.set_wired_limit(0) if mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu, 0) else 0
    yield fact("wired", f"up to {format_size(wired)}" if wired else "no")
