"""One pipeline stage of a worker, put together: the model's part, its links, and what runs its steps."""

from collections.abc import Callable, Sequence

from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs
from pomarium.worker.handoff.tensors import Expected
from pomarium.worker.model_runner import ModelRunner, StepStats
from pomarium.worker.models.paged import StageModel
from pomarium.worker.pipeline.forward import LastStageForward, StageForward
from pomarium.worker.pipeline.links import StageLinks
from pomarium.worker.pipeline.place import StagePlace
from pomarium.worker.pipeline.runner import RelayRunner
from pomarium.worker.sampling.rows import LogitsProcessor
from pomarium.worker.sampling.sampler import Sampler


class Stage:
    """Methods in the order of calls: listen, connect, runner.

    Attributes:
        place: of the stage among the others. model: its layers.
    """

    def __init__(self, place: StagePlace, model: StageModel) -> None:
        self.place = place
        self.model = model
        self._links: StageLinks | None = None

    @property
    def links(self) -> StageLinks:
        """To the other stages. Raises RuntimeError before `listen`."""
        if self._links is None:
            raise RuntimeError("the stage does not listen yet")
        return self._links

    def listen(self, on_failure: Callable[[Exception], None]) -> str:
        """Begin to listen for the other stages; returns the address. Raises HandoffError or OSError."""
        received = self.model.received
        expected = None if received is None else Expected(received, (None, self.model.hidden_size))
        self._links = StageLinks(self.place, expected, on_failure)
        return self._links.address

    def connect(self, addresses: Sequence[str]) -> None:
        """Open the links to the other stages; `addresses` by rank. Raises HandoffError."""
        self.links.connect(addresses)

    def runner(
        self,
        backend: AttentionBackend,
        graphs: DecodeGraphs | None,
        sampler: Sampler,
        on_step: Callable[[StepStats], None],
        processors: LogitsProcessor | None,
        invariant_processors: LogitsProcessor | None,
    ) -> ModelRunner | RelayRunner:
        """What runs the stage's steps over the pool of `backend`; the last stage's samples."""
        forward = StageForward(self.model, backend, graphs)
        if self.place.is_last:
            last = LastStageForward(forward, self.links)
            return ModelRunner(last, sampler, on_step, processors, invariant_processors, self.links)
        # The engine keeps at most one step more under way than there are stages.
        depth = len(self.place.cuts) + 1
        return RelayRunner(forward, self.links, sampler.vocab_size, self.place.is_first, depth, on_step)

    def close(self) -> None:
        """End the links without a fault."""
        if self._links is not None:
            self._links.close()
