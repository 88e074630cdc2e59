"""Links between stages that delay, lose, alter and reset what they carry, under vLLM's engine: the same tokens, or a
fault that is told in time.

Stages are threads here (staged_engine.py), links are TCP connections through a proxy.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_process import engine, generate
from link_proxy import LinkProxy
from staged_engine import StageThread, staged
from tiny_models import write_checkpoint
from vllm import LLM, SamplingParams

from pomarium.cluster.executor.codec import WorkerError

pytestmark = pytest.mark.e2e

FAULT_S = 10.0
BOUNDS = [0, 2, 4]
PROMPTS = [[7, 8, 9], [11] * 40, [5, 6] * 20, [3]]
PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with engine(model) as llm:
        return tokens(llm)


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], PARAMS, use_tqdm=False
    )]  # fmt: skip


@contextmanager
def proxied(model: Path) -> Iterator[tuple[LLM, list[LinkProxy]]]:
    """The engine, and the proxies that carry something: hidden states forth, tokens back."""
    with staged(model, BOUNDS, worker_cls="proxied_worker.ProxiedWorker") as (llm, stages):
        yield llm, [proxies_of(stages[0])[1], proxies_of(stages[1])[0]]


def proxies_of(stage: StageThread) -> list[LinkProxy]:
    proxies: list[LinkProxy] = stage.host.worker.proxies
    return proxies


def test_a_slow_link(model: Path, expected: list[list[int]]) -> None:
    with proxied(model) as (llm, proxies):
        for proxy in proxies:
            proxy.delay_s, proxy.bytes_per_s = 0.003, 2e6
        assert tokens(llm) == expected


def test_a_link_that_is_reset_again_and_again(model: Path, expected: list[list[int]]) -> None:
    """What was under way is lost with each connection and sent again; nothing is computed twice."""
    over = threading.Event()

    def cut() -> None:
        while not over.wait(0.15):
            for proxy in proxies:
                proxy.cut()

    with proxied(model) as (llm, proxies):
        before = [proxy.connections for proxy in proxies]
        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        try:
            for proxy in proxies:
                proxy.delay_s = 0.002  # so that something is under way when the cut comes
            assert tokens(llm) == expected
        finally:
            over.set()
            thread.join(5)
        assert all(proxy.connections > count for proxy, count in zip(proxies, before, strict=True))


def test_a_link_that_stalls_for_a_while(model: Path, expected: list[list[int]]) -> None:
    """Packets lost and sent again by TCP: nothing for half a second."""

    def stall() -> None:
        for _ in range(3):
            time.sleep(0.2)
            for proxy in proxies:
                proxy.hold()
            time.sleep(0.5)
            for proxy in proxies:
                proxy.release()

    with proxied(model) as (llm, proxies):
        thread = threading.Thread(target=stall, daemon=True)
        thread.start()
        assert tokens(llm) == expected
        thread.join(5)


def test_altered_bytes_reach_no_model(model: Path) -> None:
    """A byte of a frame's payload is changed on its way: the checksum finds it, and the plan ends."""
    struck: list[float] = []

    def alter(data: bytes) -> bytes:
        if len(data) > 4000 and not struck:  # most of it is payload
            struck.append(time.monotonic())
            middle = len(data) // 2
            return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]
        return data

    with proxied(model) as (llm, proxies):
        proxies[0].alter = alter
        with pytest.raises(WorkerError, match="arrived altered"):
            tokens(llm)
        assert time.monotonic() - struck[0] < FAULT_S


def generate_for_ever(llm: LLM) -> None:
    while True:
        generate(llm, [[7, 8, 9]] * 4, PARAMS)


def hold(proxies: list[LinkProxy]) -> None:
    for proxy in proxies:
        proxy.hold()


def refuse(proxies: list[LinkProxy]) -> None:
    for proxy in proxies:
        proxy.refusing = True
        proxy.cut()


@pytest.mark.parametrize("fault", [hold, refuse], ids=["pulled", "refused"])
def test_a_link_that_is_lost_for_good(model: Path, fault: Callable[[list[LinkProxy]], None]) -> None:
    with proxied(model) as (llm, proxies):
        at: list[float] = []

        def strike() -> None:
            time.sleep(0.3)
            at.append(time.monotonic())
            fault(proxies)

        threading.Thread(target=strike, daemon=True).start()
        with pytest.raises(Exception, match=r"handoff|link|stage"):
            generate_for_ever(llm)
        assert at, "the engine failed before the fault"
        assert time.monotonic() - at[0] < FAULT_S
        for proxy in proxies:
            proxy.release()
