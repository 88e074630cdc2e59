"""Our types from vLLM's, and vLLM's from ours: pure functions, which keep nothing.

    LayerCache, StateCache --spec_of, state_spec_of--> vLLM KVCacheSpec --vLLM--> KVCacheConfig --blocks_of--+
    vLLM SchedulerOutput   --step_of, sampling_of--> Step <--------------------------------------------------+
    vLLM GrammarOutput     --grammar_of--> Grammar
    StepResult             --output_of--> vLLM ModelRunnerOutput

Below `metal_worker`, which calls them. What they translate to and from is tested without vLLM.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec
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
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.paging import Paging, expand
from pomarium.worker.kv_cache.states import StateCache
from pomarium.worker.pictures import Picture
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import BlockTables, CachedRequest, Grammar, NewRequest, Step, StepResult
from pomarium.worker.vllm_logits_processors import OperatorProcessors
from pomarium.worker.vllm_step import SeeingStep

MX_DTYPES = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
_TORCH_DTYPES = {value: key for key, value in MX_DTYPES.items()}


def spec_of(layer: LayerCache, dtype: mx.Dtype, paging: Paging) -> KVCacheSpec:
    """What an attention layer keeps. `dtype`: of its K and V."""
    common = {
        "block_size": paging.tokens,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_dim,
        "dtype": _TORCH_DTYPES[dtype],
    }
    if layer.latent:
        return MLAAttentionSpec(**common)
    if layer.window is None:
        return FullAttentionSpec(**common, head_size_v=layer.value_dim)
    return SlidingWindowSpec(**common, head_size_v=layer.value_dim, sliding_window=layer.window)


def state_spec_of(state: StateCache, mode: str, max_model_len: int, paging: Paging) -> MambaSpec:
    """What a recurrent layer keeps. `mode`: vLLM's `mamba_cache_mode`."""
    # A sequence keeps one state, or with prefix caching (vLLM's mode "align") one more for each block.
    return MambaSpec(
        block_size=paging.tokens if mode == "align" else max_model_len,
        shapes=(state.conv, state.recurrent),
        dtypes=(_TORCH_DTYPES[state.conv_dtype], torch.float32),
        page_size_padded=paging.page,
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        mamba_cache_mode=mode,
    )


def blocks_of(config: KVCacheConfig, paging: Paging) -> tuple[int, ...]:
    """For each block table, how many of the pool's blocks one of vLLM's is."""
    return tuple(1 if isinstance(group.kv_cache_spec, MambaSpec) else paging.blocks for group in config.kv_cache_groups)


def step_of(output: SchedulerOutput, blocks: Sequence[int]) -> Step:
    """A step from vLLM's scheduler. `blocks`: see `blocks_of`."""
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
        unseen=output.unseen if isinstance(output, SeeingStep) else {},
        forgotten=frozenset(output.free_encoder_mm_hashes),
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
        pictures=tuple(_picture(feature) for feature in new.mm_features),
    )


def _picture(feature: MultiModalFeatureSpec) -> Picture:
    where = feature.mm_position
    takes = np.ones(where.length, bool) if where.is_embed is None else where.is_embed.numpy().astype(bool)
    return Picture(feature.identifier, where.offset, where.length, takes)


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
