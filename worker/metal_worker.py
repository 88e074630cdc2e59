"""MetalWorker: vLLM's worker contract over the engine below it. The only module of worker/ that imports vLLM.

    VllmConfig        --init_device, load_model--> Device, LoadedModel, PagedModel
    PagedModel.layers --get_kv_cache_spec--> vLLM's block manager --initialize_from_config--> CacheLayout, PagedPool
    SchedulerOutput   --step_of--> Step --ModelRunner--> StepResult --output_of--> ModelRunnerOutput

Contract: vllm/v1/worker/worker_base.py (WorkerBase) and what vllm/v1/engine/core.py calls, vLLM 0.29. Everything here
translates; what it translates to and from is tested without vLLM.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, LogprobsTensors, ModelRunnerOutput
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
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from pomarium.worker import blas, memory
from pomarium.worker.activations import activation_bytes, layer_width
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.cache_backend import cache_backend
from pomarium.worker.device import Device, use
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.forward import ContiguousForward, Forward, PagedForward, contiguous_layer
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.paging import Paging, expand, paging_of
from pomarium.worker.kv_cache.placement import layout_of, names_of, state_layout_of
from pomarium.worker.kv_cache.states import StateCache
from pomarium.worker.model_runner import ModelRunner, StepStats
from pomarium.worker.models.load import LoadedModel, load
from pomarium.worker.models.paged import PagedModel, StageModel, prepare, prepare_stage
from pomarium.worker.models.resolve import resolve
from pomarium.worker.models.verify import PROVEN, verify, verify_stage
from pomarium.worker.pipeline.place import Surroundings
from pomarium.worker.pipeline.stage import Stage
from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.settings import DeviceKind
from pomarium.worker.settings import load as load_settings
from pomarium.worker.step import BlockTables, CachedRequest, Grammar, NewRequest, Step, StepResult
from pomarium.worker.wiring import wire

logger = logging.getLogger(__name__)

KV_LAYOUT = "LBHNC"
"""vLLM's name of PagedPool's order (vllm/v1/kv_cache_layout.py): layers, blocks, heads, tokens, content."""

_MX_DTYPES = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
_TORCH_DTYPES = {value: key for key, value in _MX_DTYPES.items()}


class MetalWorker(WorkerBase):
    """One worker: a model on this machine's device, with its KV cache. Methods are called in the order below."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as vLLM's WorkerBase."""
        super().__init__(*args, **kwargs)
        self._listeners: list[Callable[[StepStats], None]] = []
        self._surroundings = Surroundings()
        self._stage: Stage | None = None

    def take_place(self, surroundings: Surroundings) -> None:
        """Learn, before anything is loaded, who shares this machine and which stage of a pipeline this is."""
        self._surroundings = surroundings

    def init_device(self) -> None:
        """Choose the device. Raises SettingsError if the environment asks for one that is absent."""
        _log_like_vllm()
        self.settings = load_settings(os.environ)
        logger.info("BLAS: %s", blas.load())
        self.mlx_device: Device = use(self.settings)
        self.device = torch.device("cpu")  # what vLLM's own tensors use; the model's arrays are MLX's
        self.memory_at_start = memory.snapshot(self.mlx_device)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the checkpoint. Raises CheckpointError, UnsupportedError."""
        if load_dummy_weights:
            raise UnsupportedError("dummy weights are not supported: drop --load-format dummy")
        folder, source = self.model_config.model, self._surroundings.source
        directory = resolve(
            folder if source is None or Path(folder).is_dir() else source,
            use_modelscope=self.settings.use_modelscope,
            modelscope_cache=self.settings.modelscope_cache,
        )
        on_cpu = self.mlx_device.kind is DeviceKind.CPU
        place = self._surroundings.place
        cut = None if place is None else place.cut
        config, dtype = self.model_config, _MX_DTYPES[self.model_config.dtype]
        self.loaded: LoadedModel = load(
            directory,
            dense=on_cpu,
            dtype=dtype,
            cut=cut,
            vocab_size=config.get_vocab_size(),
            longest=config.max_model_len,
        )
        model_type = self.loaded.config["model_type"]
        self.paged: PagedModel | None = None
        if place is not None:
            self._stage = Stage(place, prepare_stage(self.loaded.model, model_type, place.cut))
            if model_type not in PROVEN:
                verify_stage(self._stage.model, model_type)
            self._keep(self._stage.model, self._stage.model.whole)
        elif self.settings.paged_attention:
            self.paged = prepare(self.loaded.model, model_type)
            if model_type not in PROVEN:
                verify(self.paged, model_type)
            self._keep(self.paged, self.paged)
        else:
            layer, dtype = contiguous_layer(self.loaded.model)
            self.layers: tuple[LayerCache, ...] = (layer,)
            self.kv_dtype, self.layer_names = dtype, names_of((0,))
            self.states: tuple[StateCache, ...] = ()
            self.state_names: tuple[str, ...] = ()
            self._paging = Paging(self.cache_config.block_size)

    def _keep(self, model: PagedModel | StageModel, whole: PagedModel) -> None:
        """vLLM knows layers by their number in the `whole` model."""
        self.layers, self.kv_dtype, self.layer_names = model.layers, model.dtype, names_of(model.own_entries)
        own = [entry for entry, state in model.state_entries.items() if state is not None]
        self.states, self.state_names = model.states, names_of(own)
        self._paging = paging_of(whole.layers, whole.states, model.dtype.size, self.cache_config.block_size)

    def listen(self, on_link_failure: Callable[[Exception], None]) -> str:
        """Begin to listen for the other stages; returns the address. Raises HandoffError or OSError.

        Args:
            on_link_failure: told, from another thread, when a link to another stage has failed.
        """
        assert self._stage is not None
        return self._stage.listen(on_link_failure)

    def connect(self, addresses: Sequence[str]) -> None:
        """Open the links to the other stages, which listen at `addresses`, by rank. Raises HandoffError."""
        assert self._stage is not None
        self._stage.connect(addresses)

    def get_model(self) -> object:
        """The mlx-lm module."""
        return self.loaded.model

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Generation only."""
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """One spec per layer that keeps something; without paging one layer that stands for all."""
        specs = {name: self._spec(layer) for name, layer in zip(self.layer_names, self.layers, strict=True)}
        states = {name: self._state_spec(state) for name, state in zip(self.state_names, self.states, strict=True)}
        return specs | states

    def _spec(self, layer: LayerCache) -> KVCacheSpec:
        common = {
            "block_size": self._paging.tokens,
            "num_kv_heads": layer.num_kv_heads,
            "head_size": layer.head_dim,
            "dtype": _TORCH_DTYPES[self.kv_dtype],
        }
        if layer.latent:
            return MLAAttentionSpec(**common)
        if layer.window is None:
            return FullAttentionSpec(**common, head_size_v=layer.value_dim)
        return SlidingWindowSpec(**common, head_size_v=layer.value_dim, sliding_window=layer.window)

    def _state_spec(self, state: StateCache) -> MambaSpec:
        # A sequence keeps one state, or with prefix caching (vLLM's mode "align") one more for each block.
        aligned = self.cache_config.mamba_cache_mode == "align"
        return MambaSpec(
            block_size=self._paging.tokens if aligned else self.model_config.max_model_len,
            shapes=(state.conv, state.recurrent),
            dtypes=(_TORCH_DTYPES[state.conv_dtype], torch.float32),
            page_size_padded=self._paging.page,
            mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
            mamba_cache_mode=self.cache_config.mamba_cache_mode,
        )

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """The pool's order, the only one."""
        return [KV_LAYOUT]

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache. Raises InsufficientMemoryError if one sequence of maximum length does not fit."""
        specs = list(self.get_kv_cache_spec().values())
        now = memory.snapshot(self.mlx_device)
        facts = memory.MemoryFacts(
            kind=self.mlx_device.kind,
            base=memory.memory_base(self.mlx_device, now),
            available=now.available,
            reserve=now.reserve,
            others=memory.others_since(self.memory_at_start, now),
            weights=self.loaded.weight_bytes,
            activations=self._activation_bytes(),
            workers=self._surroundings.workers,
            fraction=self.settings.memory_fraction,
            paged=self.settings.paged_attention,
            sequence=self._paging.physical(sum(spec.max_memory_usage_bytes(self.vllm_config) for spec in specs)),
            sequences=self.scheduler_config.max_num_seqs,
            block=self._paging.physical(sum(spec.page_size_bytes for spec in specs)),
            mixed=any(spec != specs[0] for spec in specs),
            stage=self._stage is not None,
        )
        return self._paging.reported(memory.cache_bytes(facts, self.cache_config.kv_cache_memory_bytes))

    def _activation_bytes(self) -> int:
        rows = self.scheduler_config.max_num_batched_tokens
        config = self.loaded.config
        hidden_size = self.model_config.get_hidden_size()
        return activation_bytes(
            rows=rows,
            sampled=min(rows, self.scheduler_config.max_num_seqs),
            hidden_size=hidden_size,
            intermediate_size=layer_width(config.get("text_config", config), hidden_size),
            vocab_size=self.model_config.get_vocab_size(),
            itemsize=self.kv_dtype.size,
        )

    def update_max_model_len(self, max_model_len: int) -> None:
        """vLLM fitted the context to the memory (--max-model-len auto)."""
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the pool and put the runner together."""
        mx.set_cache_limit(self._activation_bytes())
        self._blocks = tuple(
            1 if isinstance(group.kv_cache_spec, MambaSpec) else self._paging.blocks
            for group in kv_cache_config.kv_cache_groups
        )
        custom = OperatorProcessors.of_config(self)
        vocab_size = self.model_config.get_vocab_size()
        sampler = Sampler(vocab_size, self.model_config.seed, self.model_config.logprobs_mode)
        if self._stage is not None:
            backend = self._cache(kv_cache_config)
            self.runner = self._stage.runner(backend, sampler, self._publish, custom[False], custom[True])
            return
        forward: Forward
        if self.paged is None:
            self._wire([])
            forward = ContiguousForward(self.loaded.model)
        else:
            forward = PagedForward(self.paged, self._cache(kv_cache_config))
        self.runner = ModelRunner(forward, sampler, self._publish, custom[False], custom[True])

    def _cache(self, kv_cache_config: KVCacheConfig) -> AttentionBackend:
        layout = layout_of(kv_cache_config, self.layers, self.layer_names, self._paging.blocks)
        states = state_layout_of(kv_cache_config, self.states, self.state_names) if self.states else None
        backend = cache_backend(layout, states, self.kv_dtype, self.mlx_device, self.settings)
        self._wire(backend.arrays)
        return backend

    def _wire(self, pool: Sequence[mx.array]) -> None:
        weights = [array for _, array in tree_flatten(self.loaded.model.parameters())]
        self._wired = wire(self.mlx_device, self.settings.wire, [*weights, *pool])

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Nothing is compiled ahead: MLX builds its kernels at the first step."""
        return CompilationTimes(0.0, 0.0)

    def memory_held(self) -> int:
        """Bytes of weights and KV cache that this worker holds."""
        return int(mx.get_active_memory())

    def subscribe(self, listener: Callable[[StepStats], None]) -> None:
        """Have every step's figures handed to `listener`, on the thread that runs the steps."""
        self._listeners.append(listener)

    def _publish(self, stats: StepStats) -> None:
        if self.settings.debug:
            logger.info(
                "%s, MLX active %d MiB, peak %d MiB", stats, mx.get_active_memory() >> 20, mx.get_peak_memory() >> 20
            )
        for listener in self._listeners:
            listener(stats)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Compute a step; None if `sample_tokens` is to follow."""
        scheduled = self.runner.execute(step_of(scheduler_output, self._blocks))
        return None if scheduled else EMPTY_MODEL_RUNNER_OUTPUT

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """Sample the step that `execute_model` computed. On a pipeline, the last stage's task."""
        assert isinstance(self.runner, ModelRunner)
        return output_of(self.runner.sample(grammar_of(grammar_output)))

    def shutdown(self) -> None:
        """End the links to other stages, without a fault."""
        if self._stage is not None:
            self._stage.close()

    def synchronize_device(self) -> None:
        """Wait for MLX."""
        mx.synchronize()

    def reset_mm_cache(self) -> None:
        """No multimodal inputs, no cache."""

    def reset_encoder_cache(self) -> None:
        """No encoder, no cache."""


def _log_like_vllm() -> None:
    """Send the worker's log lines where vLLM's go, at its level (VLLM_LOGGING_LEVEL)."""
    ours, theirs = logging.getLogger("pomarium"), logging.getLogger("vllm")
    ours.setLevel(theirs.level)
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)


def step_of(output: SchedulerOutput, blocks: Sequence[int]) -> Step:
    """A step from vLLM's scheduler. `blocks`: for each block table, how many of the pool's blocks one of vLLM's is."""
    cached = output.scheduled_cached_reqs
    return Step(
        num_scheduled_tokens=output.num_scheduled_tokens,
        new=tuple(_new_request(new, blocks) for new in output.scheduled_new_reqs),
        cached=tuple(
            CachedRequest(
                request_id,
                num_computed_tokens=cached.num_computed_tokens[index],
                new_block_ids=_tables(cached.new_block_ids[index], blocks),
                resumed=request_id in cached.resumed_req_ids,
                token_ids=tuple(cached.all_token_ids[request_id]) if request_id in cached.resumed_req_ids else None,
            )
            for index, request_id in enumerate(cached.req_ids)
        ),
        finished=frozenset(output.finished_req_ids),
    )


def _new_request(new: NewRequestData, blocks: Sequence[int]) -> NewRequest:
    prompt = new.prompt_token_ids or []
    return NewRequest(
        new.req_id,
        token_ids=tuple(new.prefill_token_ids or prompt),
        num_prompt_tokens=len(prompt),
        num_computed_tokens=new.num_computed_tokens,
        block_ids=_tables(new.block_ids, blocks) or (),
        sampling=sampling_of(new.sampling_params),
    )


def _tables(block_ids: tuple[list[int], ...] | None, blocks: Sequence[int]) -> BlockTables | None:
    return None if block_ids is None else expand(tuple(tuple(table) for table in block_ids), blocks)


def sampling_of(params: VllmSamplingParams) -> SamplingParams:
    """What of vLLM's parameters concerns the worker; stop strings, n and the like act in the engine."""
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(0, params.top_k),
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias or {},
        allowed_token_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
        bad_words=tuple(tuple(word) for word in params.bad_words_token_ids or ()),
        min_tokens=params.min_tokens,
        stop_token_ids=frozenset(params.all_stop_token_ids),
        num_logprobs=params.logprobs,
        num_prompt_logprobs=params.prompt_logprobs,
        logprob_token_ids=None if params.logprob_token_ids is None else tuple(params.logprob_token_ids),
        extra_args={**(params.extra_args or {}), OperatorProcessors.PARAMS: params},
    )


def grammar_of(output: GrammarOutput | None) -> Grammar | None:
    """Rows of vLLM's bitmask by request."""
    if output is None:
        return None
    rows = zip(output.structured_output_request_ids, output.grammar_bitmask, strict=False)
    return Grammar({request_id: row.view(np.uint32) for request_id, row in rows})


def output_of(result: StepResult) -> ModelRunnerOutput:
    """vLLM's form of a result."""
    logprobs = None
    if result.logprobs is not None:
        # Rows exist for the requests that sampled; vLLM finds a request's rows by these starts.
        starts = np.cumsum([0, *(len(tokens) for tokens in result.token_ids)]).tolist()
        found = result.logprobs
        logprobs = LogprobsLists(found.token_ids, found.logprobs, found.ranks, starts)
    return ModelRunnerOutput(
        req_ids=list(result.request_ids),
        req_id_to_index={request_id: index for index, request_id in enumerate(result.request_ids)},
        sampled_token_ids=[list(tokens) for tokens in result.token_ids],
        logprobs=logprobs,
        prompt_logprobs_dict={
            request_id: LogprobsTensors(
                torch.from_numpy(chunk.token_ids), torch.from_numpy(chunk.logprobs), torch.from_numpy(chunk.ranks)
            )
            for request_id, chunk in result.prompt_logprobs.items()
        },
    )


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
    def of_config(cls, worker: MetalWorker) -> dict[bool, "OperatorProcessors | None"]:
        """The processors that are (True) and are not (False) argmax-invariant; None where there are none."""
        config, device = worker.vllm_config, worker.device
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


def _names(model_config: object) -> tuple[object, ...] | None:
    processors = model_config.logits_processors  # type: ignore[attr-defined]
    return None if processors is None else tuple(processors)
