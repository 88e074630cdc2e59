"""Gives a configuration its scheduler, and one with several stages its queue of steps.

    platform.check_and_update_config --install(VllmConfig)--> scheduler_cls, and a VllmConfig whose queue is S + 1 deep

`VllmConfig.max_concurrent_batches` is a property that says S where vLLM's model runner V2 is not used. The engine sizes
its queue by it, and schedulers and workers the KV cache. A configuration is pickled into the processes of the engine
and of the workers, where no hook runs: it takes the override with it as its class. Schedulers are named and not
imported: only EngineCore needs them, and the start of every other process would wait for their imports.
"""

from typing import Any

from vllm.config import SchedulerConfig, VllmConfig
from vllm.utils.import_utils import resolve_obj_by_qualname

PACKAGE = "pomarium.cluster.engine.scheduling."
BOUND, COHORTS, RESUMED = f"{PACKAGE}bounded.", f"{PACKAGE}scheduler.", f"{PACKAGE}resumed."


class OwnSchedulerConfig(SchedulerConfig):
    """A SchedulerConfig whose scheduler is one of ours, of which vLLM would warn as of a stranger's."""

    def get_scheduler_cls(self) -> Any:
        return resolve_obj_by_qualname(str(self.scheduler_cls))


class StagedConfig(VllmConfig):
    """A VllmConfig of several stages whose tokens go from the last to the first without the scheduler."""

    @property
    def max_concurrent_batches(self) -> int:
        """Steps that are under way at once: one for each stage, and with async scheduling the one that comes next."""
        return int(self.parallel_config.pipeline_parallel_size) + bool(self.scheduler_config.async_scheduling)


def scheduler_for(stages: int, asynchronous: bool, bound: bool) -> str:
    """Qualified name of the scheduler."""
    if stages > 1:
        sync = "" if asynchronous else "Sync"
        return f"{BOUND}Bound{sync}CohortScheduler" if bound else f"{COHORTS}{sync}CohortScheduler"
    kind = "Async" if asynchronous else ""
    return f"{BOUND}Bound{kind}Scheduler" if bound else f"{RESUMED}Resuming{kind}Scheduler"


def install(config: VllmConfig, step_seconds: float) -> None:
    """Complete `config`. May run more than once on it.

    A scheduler that the user names (--scheduler-cls) stays, with vLLM's queue, unless it is one of ours.

    Args:
        step_seconds: what a step is to take at most; 0: no bound.
    """
    scheduling = config.scheduler_config
    stages = config.parallel_config.pipeline_parallel_size
    if scheduling.scheduler_cls is None:
        scheduling.scheduler_cls = scheduler_for(stages, bool(scheduling.async_scheduling), step_seconds > 0)
        scheduling.__class__ = OwnSchedulerConfig
    if stages > 1 and (isinstance(scheduling, OwnSchedulerConfig) or _of_cohorts(scheduling.scheduler_cls)):
        config.__class__ = StagedConfig


def _of_cohorts(scheduler: object) -> bool:
    from pomarium.cluster.engine.scheduling.scheduler import SyncCohortScheduler

    return isinstance(scheduler, type) and issubclass(scheduler, SyncCohortScheduler)
