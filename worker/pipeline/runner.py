"""One step of a stage that is not the last: rows in, hidden states on, nothing sampled.

    Step --RequestTable, ReturnedTokens--> Batch --StageForward--> hidden states --StageLinks--> next stage

The last stage is a ModelRunner over LastStageForward that returns its tokens to the first.
"""

import time
from collections.abc import Callable

import mlx.core as mx

from pomarium.worker.batch import build_batch
from pomarium.worker.model_runner import StepStats
from pomarium.worker.pipeline.forward import StageForward
from pomarium.worker.pipeline.links import StageLinks
from pomarium.worker.pipeline.returned import ReturnedTokens
from pomarium.worker.requests import RequestTable
from pomarium.worker.step import Step


class RelayRunner:
    """Runs steps and hands their hidden states on.

    Args:
        vocab_size: tokens that the embedding holds. depth: steps that can be under way at once.
        on_step: called with each step's figures.
    """

    def __init__(
        self,
        forward: StageForward,
        links: StageLinks,
        vocab_size: int,
        first: bool,
        depth: int,
        on_step: Callable[[StepStats], None],
    ) -> None:
        self.requests = RequestTable(vocab_size)
        self._forward = forward
        self._links = links
        self._first = first
        self._returned = ReturnedTokens(links.receive_tokens if first else None, depth)
        self._on_step = on_step

    def execute(self, step: Step) -> bool:
        """Compute a step and queue its hidden states; False if no tokens were scheduled.

        Raises:
            HandoffError: a neighbour is lost or does not answer.
        """
        began, waited, handing = time.perf_counter(), self._links.waited_s, self._links.handing_s
        scheduled = self.requests.apply(step)
        if not scheduled:
            return False
        number = self._links.begin_step()
        self._returned.settle(number, [request for request, _ in scheduled])
        batch = build_batch(scheduled)
        inputs = mx.array(batch.token_ids) if self._first else self._links.receive_hidden()
        hidden = self._forward.run(batch, inputs)
        self._links.hand_on(hidden)
        for request, count in scheduled:
            request.num_computed_tokens += count
        self._returned.expect(number, [self.requests[request_id] for request_id in batch.samplers])
        waited, handing = self._links.waited_s - waited, self._links.handing_s - handing
        self._on_step(
            StepStats(
                len(scheduled),
                len(batch.token_ids),
                0,
                self.requests.cached_tokens,
                time.perf_counter() - began - waited - handing,
                waited,
                handing,
            )
        )
        return True
