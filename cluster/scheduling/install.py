"""Gives a configuration with several stages its scheduler and its queue of steps.

    platform.check_and_update_config --stage(VllmConfig)--> scheduler_cls, and a VllmConfig whose queue is S + 1 deep

`VllmConfig.max_concurrent_batches` is a property that says S where vLLM's model runner V2 is not used. The engine sizes
its queue by it, and schedulers and workers the KV cache. A configuration is pickled into the processes of the engine
and of the workers, where no hook runs: it takes the override with it as its class.
"""

from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler

from pomarium.cluster.scheduling.scheduler import CohortScheduler, SyncCohortScheduler


class StagedConfig(VllmConfig):
    """A VllmConfig of several stages whose tokens go from the last to the first without the scheduler."""

    @property
    def max_concurrent_batches(self) -> int:
        """Steps that are under way at once: one for each stage, and with async scheduling the one that comes next."""
        return int(self.parallel_config.pipeline_parallel_size) + bool(self.scheduler_config.async_scheduling)


def scheduler_for(stages: int, asynchronous: bool) -> type[Scheduler] | None:
    """None, vLLM's own, for one stage."""
    if stages == 1:
        return None
    return CohortScheduler if asynchronous else SyncCohortScheduler


def stage(config: VllmConfig) -> None:
    """Complete `config` if it has several stages. May run more than once on it.

    A scheduler that the user names (--scheduler-cls) stays, with vLLM's queue, unless it is one of ours.
    """
    scheduling = config.scheduler_config
    ours = scheduler_for(config.parallel_config.pipeline_parallel_size, bool(scheduling.async_scheduling))
    if ours is None:
        return
    if scheduling.scheduler_cls is None:
        scheduling.scheduler_cls = ours
    if isinstance(scheduling.scheduler_cls, type) and issubclass(scheduling.scheduler_cls, SyncCohortScheduler):
        config.__class__ = StagedConfig
