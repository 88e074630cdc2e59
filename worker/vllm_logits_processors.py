"""vLLM's logits processors, run by the sampler as one stage.

    VllmConfig --of_config--> OperatorProcessors, before or behind the sampler's own stages
    logits (R, V), SamplingRow x R --apply--> vLLM's BatchUpdate, every processor in turn --> logits (R, V)

The sampler knows them as sampling.rows.LogitsProcessor. Contract: vllm/v1/sample/logits_processor, vLLM 0.29.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    cached_load_custom_logitsprocs,
)
from vllm.v1.sample.thinking_budget_state import (
    ThinkingBudgetStateHolder,
    maybe_create_thinking_budget_state_holder,
)

from pomarium.worker.sampling.rows import SamplingRow


class OperatorProcessors:
    """vLLM's custom logits processors (--logits-processors, entry points) and its thinking budget, as one stage.

    vLLM's processors know requests by their index in a persistent batch and are told of changes to it; this keeps such
    a batch of the requests that sample. A request that skips a step leaves it and comes back, as in vLLM's own runner.
    """

    PARAMS = "_vllm_sampling_params"
    """Key in SamplingParams.extra_args under which a request's original parameters travel to the processors."""

    def __init__(self, processors: Sequence[LogitsProcessor], thinking: ThinkingBudgetStateHolder | None) -> None:
        self._processors = processors
        self._thinking = thinking
        self._order: list[str] = []
        self._outputs: dict[str, list[int]] = {}

    @classmethod
    def of_config(cls, config: VllmConfig, device: torch.device) -> dict[bool, "OperatorProcessors | None"]:
        """The processors that are (True) and are not (False) argmax-invariant; None where there are none."""
        found = [kind(config, device, False) for kind in cached_load_custom_logitsprocs(_names(config.model_config))]
        thinking = maybe_create_thinking_budget_state_holder(
            config.reasoning_config, config.scheduler_config.max_num_seqs, 0, device, False
        )
        early = [processor for processor in found if not processor.is_argmax_invariant()]
        late = [processor for processor in found if processor.is_argmax_invariant()]
        return {False: cls(early, thinking) if early or thinking else None, True: cls(late, None) if late else None}

    def apply(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> np.ndarray:
        """See sampling.rows.LogitsProcessor."""
        update = self._update(rows)
        place = {request_id: index for index, request_id in enumerate(self._order)}
        order = [place[row.request_id] for row in rows]
        batch = torch.empty(logits.shape, dtype=torch.float32)
        batch[order] = torch.from_numpy(logits)
        for processor in self._processors:
            processor.update_state(update)
            batch = processor.apply(batch)
        if self._thinking is not None:
            self._thinking.sync_batch(update)
            self._thinking.update_state([self._outputs[request_id] for request_id in self._order], None)
            batch = self._thinking.apply_to_logits(batch, False, None)
        changed: np.ndarray = batch[order].numpy()
        return changed

    def _update(self, rows: Sequence[SamplingRow]) -> BatchUpdate | None:
        """Bring the persistent batch to `rows`: removals, additions into the holes, moves that close the rest."""
        wanted = {row.request_id: row for row in rows}
        slots: list[str | None] = [request_id if request_id in wanted else None for request_id in self._order]
        removed = [index for index, request_id in enumerate(slots) if request_id is None]
        for request_id in [request_id for request_id in self._outputs if request_id not in wanted]:
            del self._outputs[request_id]
        holes, added, moved = list(removed), [], []
        for request_id, row in wanted.items():
            if request_id in self._outputs:
                self._outputs[request_id][:] = row.output_token_ids
                continue
            output = self._outputs[request_id] = list(row.output_token_ids)
            index = holes.pop(0) if holes else len(slots)
            slots[index : index + 1] = [request_id]
            params = (row.params.extra_args or {})[self.PARAMS]
            added.append((index, params, list(row.prompt_token_ids), output))
        while holes:
            if slots[-1] is None:
                holes.remove(len(slots) - 1)
            else:
                hole = holes.pop(0)
                slots[hole] = slots[-1]
                moved.append((len(slots) - 1, hole, MoveDirectionality.UNIDIRECTIONAL))
            slots.pop()
        self._order = [request_id for request_id in slots if request_id is not None]
        return BatchUpdate(len(rows), removed, added, moved) if removed or added or moved else None


def _names(model_config: ModelConfig) -> tuple[object, ...] | None:
    processors = model_config.logits_processors
    return None if processors is None else tuple(processors)
