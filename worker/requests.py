"""The requests that a worker holds between steps: their tokens, their blocks, how much of them is cached.

The scheduler sends a request once and then only what changed, so this table is the worker's only mutable knowledge of
requests. Sampled tokens are appended here and stay here: with async scheduling the next step is planned before the
scheduler has seen them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pomarium.worker.pictures import Picture
from pomarium.worker.sampling.occurrences import Occurrences
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import CachedRequest, Logprobs, NewRequest, Step


@dataclass
class RequestState:
    """One live request.

    Attributes:
        token_ids: prompt and sampled tokens. num_computed_tokens: leading tokens whose K/V are cached.
        block_tables: one list of block ids per cache group.
        prompt_logprobs: finished chunks of its prompt's log-probabilities.
        pictures: the images of its prompt.
        occurrences: of `token_ids`, as far as the sampler has counted them.
    """

    id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_tables: list[list[int]]
    sampling: SamplingParams
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    pictures: tuple[Picture, ...] = ()
    occurrences: Occurrences = field(default_factory=Occurrences)


class RequestTable:
    """Live requests by id, all of whose tokens are below `vocab_size`.

    vLLM's front end refuses a request with others (cluster/engine/request_bounds.py), and what is sampled is below.
    Where tokens come in they are looked at once more, because MLX would read another's row from foreign memory.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._requests: dict[str, RequestState] = {}

    def __getitem__(self, request_id: str) -> RequestState:
        return self._requests[request_id]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose K and V live requests hold; a shared prefix counts for each of them."""
        return sum(request.num_computed_tokens for request in self._requests.values())

    def apply(self, step: Step) -> list[tuple[RequestState, int]]:
        """Take in what changed and return the scheduled (request, number of tokens), in the step's order.

        Raises:
            KeyError: if the step names a request that was never sent.
            ValueError: if it brings a token that the embedding does not hold.
        """
        self._drop(step.finished)
        for new in step.new:
            self._check(new.id, new.token_ids)
            self._requests[new.id] = _admit(new)
        for cached in step.cached:
            self._check(cached.id, cached.token_ids or ())
            _update(self._requests[cached.id], cached)
        return [(self._requests[request_id], count) for request_id, count in step.num_scheduled_tokens.items()]

    def _check(self, request_id: str, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise ValueError(
                f"request {request_id} holds tokens from {min(token_ids)} to {max(token_ids)}, but the vocabulary has "
                f"{self._vocab_size}"
            )

    def _drop(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            # A request aborted before it was ever scheduled is reported as finished, too.
            self._requests.pop(request_id, None)


def _admit(new: NewRequest) -> RequestState:
    return RequestState(
        new.id,
        list(new.token_ids),
        new.num_prompt_tokens,
        new.num_computed_tokens,
        [list(table) for table in new.block_ids],
        new.sampling,
        pictures=new.pictures,
    )


def _update(request: RequestState, cached: CachedRequest) -> None:
    request.num_computed_tokens = cached.num_computed_tokens
    if cached.resumed:
        request.block_tables = [list(table) for table in cached.new_block_ids or ()]
        request.prompt_logprobs = []
        if cached.token_ids is not None:
            request.token_ids, request.occurrences = list(cached.token_ids), Occurrences()
    elif cached.new_block_ids is not None:
        for table, blocks in zip(request.block_tables, cached.new_block_ids, strict=True):
            table += blocks
