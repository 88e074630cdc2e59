"""What an engine's configuration asks of the rack, where nobody planned before the engine existed."""

from vllm.config import VllmConfig

from pomarium.cluster.executor.staging import Ask

SHARE_MACS = "share_macs"
"""Key in vLLM's additional_config: stages may share a Mac."""


def ask_of(config: VllmConfig) -> Ask:
    """Workers for the engine of `config`: a stage each."""
    scheduler, additional = config.scheduler_config, config.additional_config
    return Ask(
        source=config.model_config.model,
        stages=config.parallel_config.pipeline_parallel_size,
        max_model_len=config.model_config.max_model_len,
        rows=scheduler.max_num_batched_tokens,
        sampled=scheduler.max_num_seqs,
        share_macs=isinstance(additional, dict) and bool(additional.get(SHARE_MACS)),
    )
