"""MetalWorker: vLLM's worker contract over the engine below it.

    VllmConfig        --init_device, load_model--> Device, LoadedModel, PagedModel
    PagedModel.layers --get_kv_cache_spec--> vLLM's block manager --initialize_from_config--> CacheLayout, PagedPool
    SchedulerOutput   --step_of--> Step --ModelRunner--> StepResult --output_of--> ModelRunnerOutput

Contract: vllm/v1/worker/worker_base.py (WorkerBase) and what vllm/v1/engine/core.py calls, vLLM 0.29. Beside it only
`vllm_translation`, which makes our types of vLLM's and back, and `vllm_logits_processors` import vLLM in worker/; both
know nothing of this module, and what is below them is tested without vLLM.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from mlx.utils import tree_flatten
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from pomarium.worker import blas, memory
from pomarium.worker.activations import activation_bytes, layer_width
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.choose import decode_graphs
from pomarium.worker.attention.decode_graphs import DecodeGraphs
from pomarium.worker.cache_backend import cache_backend
from pomarium.worker.device import Device, use
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.forward import ContiguousForward, Forward, PagedForward, contiguous_layer
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.paging import Paging, paging_of
from pomarium.worker.kv_cache.placement import layout_of, names_of, state_layout_of
from pomarium.worker.kv_cache.states import StateCache
from pomarium.worker.model_runner import ModelRunner, StepStats, UnreadStep
from pomarium.worker.models.load import LoadedModel, load
from pomarium.worker.models.paged import PagedModel, StageModel, prepare, prepare_stage
from pomarium.worker.models.resolve import resolve
from pomarium.worker.models.verify import PROVEN, verify, verify_stage
from pomarium.worker.pipeline.place import Surroundings
from pomarium.worker.pipeline.stage import Stage
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.settings import DeviceKind
from pomarium.worker.settings import load as load_settings
from pomarium.worker.vision.encoder_cache import EncoderCache
from pomarium.worker.vision.merge import Sight, embedding_of
from pomarium.worker.vision.tower import Tower, load_tower, tower_activation_bytes
from pomarium.worker.vllm_logits_processors import OperatorProcessors
from pomarium.worker.vllm_translation import (
    MX_DTYPES,
    blocks_of,
    grammar_of,
    output_of,
    spec_of,
    state_spec_of,
    step_of,
)
from pomarium.worker.warm_up import warm_up
from pomarium.worker.wiring import wire

logger = logging.getLogger(__name__)

KV_LAYOUT = "LBHNC"
"""vLLM's name of PagedPool's order (vllm/v1/kv_cache_layout.py): layers, blocks, heads, tokens, content."""


class UnreadOutput(AsyncModelRunnerOutput):
    """The output of a step whose tokens are still on the device."""

    def __init__(self, step: UnreadStep) -> None:
        self._step = step

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the tokens."""
        return output_of(self._step.read())


class MetalWorker(WorkerBase):
    """One worker: a model on this machine's device, with its KV cache. Methods are called in the order below."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as vLLM's WorkerBase."""
        super().__init__(*args, **kwargs)
        self._listeners: list[Callable[[StepStats], None]] = []
        self._surroundings = Surroundings()
        self._stage: Stage | None = None
        self._graphs: DecodeGraphs | None = None
        self._forward: Forward | None = None
        self._tower: Tower | None = None
        self._pictures: EncoderCache | None = None

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
        config, dtype = self.model_config, MX_DTYPES[self.model_config.dtype]
        self.loaded: LoadedModel = load(
            directory,
            dense=on_cpu,
            dtype=dtype,
            cut=cut,
            vocab_size=config.get_vocab_size(),
            longest=config.max_model_len,
        )
        if self.model_config.is_multimodal_model:  # refused at start for stages, and without paging
            self._tower = load_tower(directory, dtype)
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
        specs = {
            name: spec_of(layer, self.kv_dtype, self._paging)
            for name, layer in zip(self.layer_names, self.layers, strict=True)
        }
        states = {
            name: state_spec_of(
                state, self.cache_config.mamba_cache_mode, self.model_config.max_model_len, self._paging
            )
            for name, state in zip(self.state_names, self.states, strict=True)
        }
        return specs | states

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
            weights=self.loaded.weight_bytes + (0 if self._tower is None else self._tower.weight_bytes),
            activations=self._activation_bytes() + self._picture_bytes(),
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

    def _picture_bytes(self) -> int:
        """Of the encoder cache when it is full, beside what the tower takes while it computes."""
        if self._tower is None:
            return 0
        tokens = max(self.scheduler_config.encoder_cache_size, self._tower.eyes.most_tokens)
        kept = tokens * self.model_config.get_hidden_size() * self.kv_dtype.size
        vision = self.loaded.config["vision_config"]
        return int(kept) + tower_activation_bytes(self._tower.eyes, vision, self.kv_dtype.size)

    def update_max_model_len(self, max_model_len: int) -> None:
        """vLLM fitted the context to the memory (--max-model-len auto)."""
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the pool and put the runner together."""
        mx.set_cache_limit(self._activation_bytes())
        self._blocks = blocks_of(kv_cache_config, self._paging)
        custom = OperatorProcessors.of_config(self.vllm_config, self.device)
        vocab_size = self.model_config.get_vocab_size()
        sampler = Sampler(vocab_size, self.model_config.seed, self.model_config.logprobs_mode)
        if self._stage is not None:
            backend = self._cache(kv_cache_config)
            self._graphs = self._graphs_of(self._stage.model, backend)
            self.runner = self._stage.runner(backend, self._graphs, sampler, self._publish, custom[False], custom[True])
            return
        if self.paged is None:
            self._wire([])
            self._forward = ContiguousForward(self.loaded.model)
        else:
            backend = self._cache(kv_cache_config)
            self._graphs = self._graphs_of(self.paged, backend)
            if self._tower is not None:
                self._pictures = EncoderCache(self._tower)
            sight = None if self._pictures is None else Sight(embedding_of(self.loaded.model), self._pictures)
            self._forward = PagedForward(self.paged, backend, self._graphs, self._graphs is not None, sight)
        ahead = self._graphs is not None
        self.runner = ModelRunner(self._forward, sampler, self._publish, custom[False], custom[True], ahead=ahead)

    def _graphs_of(self, model: PagedModel | StageModel, backend: AttentionBackend) -> DecodeGraphs | None:
        return decode_graphs(model, backend) if self.settings.decode_graphs else None

    def _cache(self, kv_cache_config: KVCacheConfig) -> AttentionBackend:
        layout = layout_of(kv_cache_config, self.layers, self.layer_names, self._paging.blocks)
        states = state_layout_of(kv_cache_config, self.states, self.state_names) if self.states else None
        backend = cache_backend(layout, states, self.kv_dtype, self.mlx_device, self.settings)
        self._wire(backend.arrays)
        return backend

    def _wire(self, pool: Sequence[mx.array]) -> None:
        weights = [array for _, array in tree_flatten(self.loaded.model.parameters())]
        weights += [] if self._tower is None else self._tower.arrays
        self._wired = wire(self.mlx_device, self.settings.wire, [*weights, *pool])

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Trace the graphs of decode steps, if there are any; else MLX builds its kernels at the first step."""
        if self._forward is None or self._graphs is None:
            return CompilationTimes(0.0, 0.0)
        most, tables = self.scheduler_config.max_num_seqs, len(self._blocks)
        return CompilationTimes(warm_up(self._forward, most, tables), 0.0)

    def memory_held(self) -> int:
        """Bytes of weights and KV cache that this worker holds."""
        return int(mx.get_active_memory())

    def subscribe(self, listener: Callable[[StepStats], None]) -> None:
        """Have every step's figures handed to `listener`, on the thread that runs the steps or reads their tokens."""
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
        step = step_of(scheduler_output, self._blocks)
        if self._pictures is not None:
            self._pictures.take(step)
        scheduled = self.runner.execute(step)
        return None if scheduled else EMPTY_MODEL_RUNNER_OUTPUT

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample the step that `execute_model` computed. On a pipeline, the last stage's task.

        Returns:
            What can be read later, if the tokens are still on the device: the next step may come before.
        """
        assert isinstance(self.runner, ModelRunner)
        sampled = self.runner.sample(grammar_of(grammar_output))
        return UnreadOutput(sampled) if isinstance(sampled, UnreadStep) else output_of(sampled)

    def shutdown(self) -> None:
        """End the links to other stages, without a fault."""
        if self._stage is not None:
            self._stage.close()

    def synchronize_device(self) -> None:
        """Wait for MLX."""
        mx.synchronize()

    def reset_mm_cache(self) -> None:
        """Nothing to do: tiles are kept by the engine alone."""

    def reset_encoder_cache(self) -> None:
        """Forget the embeddings of all images: the engine has."""
        if self._pictures is not None:
            self._pictures.clear()


def _log_like_vllm() -> None:
    """Send the worker's log lines where vLLM's go, at its level (VLLM_LOGGING_LEVEL)."""
    ours, theirs = logging.getLogger("pomarium"), logging.getLogger("vllm")
    ours.setLevel(theirs.level)
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
