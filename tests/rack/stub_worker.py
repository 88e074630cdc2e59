"""A worker of vLLM's contract without a model, for tests of the executor: no MLX, no weights.

Found by its name `stub_worker.StubWorker` with this folder on PYTHONPATH. Each request's token is FIRST_TOKEN plus the
number of tokens it holds, so a lost, doubled or reordered step shows in the output. STUB_FAIL names a method that
raises; STUB_STEP_MS is the time a step takes.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from pomarium.worker.errors import CheckpointError

FIRST_TOKEN = 3
NUM_TOKENS = 120
FAIL, STEP_MS = "VLLM_STUB_FAIL", "VLLM_STUB_STEP_MS"
BROKEN_WEIGHTS = "model.safetensors is truncated: download it again."


def token_after(num_tokens: int) -> int:
    """The token that follows `num_tokens` known ones."""
    return FIRST_TOKEN + num_tokens % NUM_TOKENS


class StubWorker(WorkerBase):
    """Attributes: devices: what VLLM_METAL_VISIBLE_DEVICES was when the worker was made."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        self.devices = os.environ.get("VLLM_METAL_VISIBLE_DEVICES")
        self._known: dict[str, int] = {}
        self._output: ModelRunnerOutput | None = None
        self._steps = 0

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        if os.environ.get(FAIL) == "load_model":
            raise CheckpointError(BROKEN_WEIGHTS)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["NHD"]

    def set_kv_cache_layout(self, kv_cache_layout: str) -> None:
        pass

    def determine_available_memory(self) -> int:
        return 1 << 24

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        return {"layers.0": FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)}

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        pass

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def reset_mm_cache(self) -> None:
        pass

    def listen(self, on_link_failure: Callable[[Exception], None]) -> str:
        """As one stage of several: nothing is handed on."""
        return ""

    def connect(self, addresses: list[str]) -> None:
        pass

    def echo(self, value: Any) -> Any:
        return value

    def raise_value_error(self) -> None:
        raise ValueError("as asked")

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        self._steps += 1
        if os.environ.get(FAIL) == "execute_model" and self._steps > 3:
            raise ValueError("the stub fails in its fourth step")
        for request_id in scheduler_output.finished_req_ids:
            self._known.pop(request_id, None)
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request in scheduler_output.scheduled_new_reqs:
            assert request.prompt_token_ids is not None
            self._known[request.req_id] = len(request.prompt_token_ids)
            computed[request.req_id] = request.num_computed_tokens
        if not scheduler_output.num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        time.sleep(float(os.environ.get(STEP_MS, "0")) / 1000)
        request_ids, tokens = [], []
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            known = self._known[request_id]
            request_ids.append(request_id)
            if computed[request_id] + count < known:
                tokens.append([])
                continue
            assert computed[request_id] + count == known, "steps were lost or reordered"
            tokens.append([token_after(known)])
            self._known[request_id] += 1
        self._output = ModelRunnerOutput(request_ids, {r: i for i, r in enumerate(request_ids)}, tokens)
        return None

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        assert self._output is not None
        output, self._output = self._output, None
        return output
