"""An answer that another engine began: its tokens are shown to vLLM's front end once more, and the engine goes on.

    each answer:  AsyncLLM.generate --outputs--> Told: groups of tokens --with the answer's pieces--> the ingress
    one resumed:  Told.groups --as if the engine had made them, group by group--> the front end: the same pieces again
                  behind the last one: the request, its tokens in extra_args --> scheduling/resumed.py, which goes on

The front end's state (text, stop strings, parsers, usage) follows from the groups in which it gets tokens, so it is in
the end what it was in the process that was lost. What it draws besides, ids of tool calls and messages, follows from
the request's seed. Log-probabilities of tokens that are shown again are blanks: the client has the right ones.

What is going on with a request is a context variable, since vLLM's own code lies between who knows of it and who needs
it. Methods of vLLM's classes are replaced; vLLM 0.29.
"""

import copy
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.stats import IterationStats, PrefillStats
from vllm.v1.outputs import LogprobsLists

from pomarium.cluster.engine.scheduling.install import OwnSchedulerConfig
from pomarium.cluster.engine.scheduling.resumption_key import OUTPUTS
from pomarium.cluster.http.progress import Finish, Group, Part, pack_group, pack_part

_FINISHES = {None: Finish.NOT, "stop": Finish.STOP, "length": Finish.LENGTH}
_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH, Finish.OTHER: FinishReason.REPETITION}

_generate, _add_request = AsyncLLM.generate, AsyncLLM._add_request
_assign_request_id = InputProcessor.assign_request_id
_uuid4 = uuid.uuid4


class NotResumableError(Exception):
    """What comes of this request cannot be shown again; says why."""


class Told:
    """What is told of one HTTP request's answer, and what was told before of one that is resumed.

    Attributes:
        groups: of an answer that is resumed; empty for a new one.
        resumable: another engine could go on with it.
    """

    def __init__(self, seed: str, groups: Sequence[Group] = ()) -> None:
        """`seed`: of what the front end draws; the same for a request that is resumed."""
        self.groups = groups
        self._pending = bytearray()
        self.resumable = True
        self.replay: Replay | None = None
        self._seed = seed
        self._random: Random | None = None
        self._generations = 0

    def begin(self, params: SamplingParams) -> bool:
        """One more generation begins; whether its tokens are to be told."""
        self._generations += 1
        # Of several generations in one answer nobody could say which pieces come of which tokens.
        self.resumable &= self._generations == 1 and params.prompt_logprobs is None
        return self.resumable

    def taken(self) -> bytes:
        """See progress.Source."""
        groups, self._pending = bytes(self._pending), bytearray()
        return groups

    def tell(self, output: RequestOutput) -> None:
        """The engine shows this."""
        pack_group(self._pending, len(output.outputs), output.num_cached_tokens or 0)
        for one in output.outputs:
            stop = one.stop_reason
            # The front end finds a stop string again by itself, and would leave out a token that ended the answer.
            finish = Finish.NOT if isinstance(stop, str) else _FINISHES.get(one.finish_reason, Finish.OTHER)
            pack_part(self._pending, one.index, one.token_ids, finish, stop if isinstance(stop, int) else None)

    def uuid4(self) -> uuid.UUID:
        """The next one of this request."""
        if self._random is None:
            self._random = Random(self._seed)
        return uuid.UUID(int=self._random.getrandbits(128), version=4)


_CURRENT: ContextVar[Told | None] = ContextVar("pomarium_told", default=None)


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """What is asked of vLLM's front end in here is the request of `told`."""
    token = _CURRENT.set(told)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@dataclass
class Replay:
    """A generation that is resumed, while its groups are shown again.

    Attributes:
        engine: vLLM's. left: groups to be shown. requests: of its choices, by index. tokens: shown, by index.
    """

    engine: AsyncLLM
    left: list[Group]
    requests: dict[int, EngineCoreRequest] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def show(self) -> None:
        """The next group. Raises NotResumableError if the front end makes nothing of it."""
        group = self.left.pop(0)
        outputs = [self._output(part, group.cached) for part in group.parts]
        # Its statistics are of a generation that was counted elsewhere; a time the next token's is compared with.
        self.engine.output_processor.process_outputs(outputs, time.monotonic(), IterationStats())

    def _output(self, part: Part, cached: int) -> EngineCoreOutput:
        request = self.requests.get(part.index)
        if request is None:
            raise NotResumableError(f"it has no choice {part.index}")
        seen = self.tokens.setdefault(part.index, [])
        first = not seen
        seen += part.token_ids
        return EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=list(part.token_ids),
            new_logprobs=_blank_logprobs(part.token_ids, request.sampling_params),
            finish_reason=_REASONS.get(part.finish),
            stop_reason=part.stop_token,
            prefill_stats=PrefillStats(num_cached_tokens=cached) if first else None,
        )

    async def go_on(self) -> None:
        """Have the engine compute what is missing of those choices that have not ended."""
        for index, request in self.requests.items():
            if request.request_id in self.engine.output_processor.request_states:
                params = copy.copy(request.sampling_params)  # choices may share it
                assert params is not None
                params.extra_args = {**(params.extra_args or {}), OUTPUTS: self.tokens.get(index, [])}
                request.sampling_params = params
                await self.engine.engine_core.add_request_async(request)


def install() -> None:
    """Have vLLM's front ends of this process behave as above. Calling it again changes nothing."""
    AsyncLLM.generate = _told
    AsyncLLM._add_request = _registered
    InputProcessor.assign_request_id = staticmethod(_with_random_id)
    uuid.uuid4 = _drawn


def _told(
    engine: AsyncLLM, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
) -> AsyncGenerator[RequestOutput, None]:
    """In place of AsyncLLM.generate."""
    inner: AsyncGenerator[RequestOutput, None] = _generate(engine, prompt, sampling_params, request_id, **options)
    told = _CURRENT.get()
    if told is None or sampling_params.output_kind is not RequestOutputKind.DELTA:
        return inner
    if not isinstance(engine.vllm_config.scheduler_config, OwnSchedulerConfig):
        told.resumable = False  # somebody else's scheduler would not go on with it
    if not told.begin(sampling_params):
        return inner
    return _telling(engine, told, inner)


async def _telling(
    engine: AsyncLLM, told: Told, inner: AsyncGenerator[RequestOutput, None]
) -> AsyncGenerator[RequestOutput, None]:
    """The groups that were told before, and then what the engine makes, which is told."""
    async with aclosing(inner):
        if told.groups:
            async for output in _shown_again(engine, told, inner):
                yield output
        async for output in inner:
            if told.resumable:
                told.tell(output)
            yield output


async def _shown_again(
    engine: AsyncLLM, told: Told, inner: AsyncGenerator[RequestOutput, None]
) -> AsyncGenerator[RequestOutput, None]:
    """The groups of `told` as outputs, each when the one before was read; behind the last the engine goes on."""
    told.replay = replay = Replay(engine, list(told.groups))
    yield await anext(inner)  # _registered has shown the first
    while replay.left:
        replay.show()
        yield await anext(inner)
    told.replay = None
    await replay.go_on()


async def _registered(
    engine: AsyncLLM, request: EngineCoreRequest, prompt: Any, parent: Any, index: int, queue: Any
) -> None:
    """In place of AsyncLLM._add_request: of a resumed generation the engine hears once its groups are shown."""
    told = _CURRENT.get()
    replay = None if told is None else told.replay
    if replay is None:
        await _add_request(engine, request, prompt, parent, index, queue)
        return
    engine.output_processor.add_request(request, prompt, parent, index, queue)
    replay.requests[index] = request
    if parent is None or index == parent.sampling_params.n - 1:
        replay.show()


def _with_random_id(request: EngineCoreRequest) -> None:
    """The engine's name for a request is no other attempt's, which may still be running."""
    token = _CURRENT.set(None)
    try:
        _assign_request_id(request)
    finally:
        _CURRENT.reset(token)


def _drawn() -> uuid.UUID:
    told = _CURRENT.get()
    return _uuid4() if told is None else told.uuid4()


def _blank_logprobs(token_ids: Sequence[int], params: SamplingParams | None) -> LogprobsLists | None:
    """For so many tokens what the front end counts, without what it would show."""
    width = None if params is None else params.num_logprobs
    if width is None:
        return None
    ids = np.repeat(np.array(token_ids, np.int64)[:, None], width + 1, axis=1)
    return LogprobsLists(ids, np.zeros(ids.shape, np.float32), np.ones(len(token_ids), np.int64))
