"""The sections of `pomarium selftest`, each a generator of events for a process of its own.

Imports of MLX and vLLM stand inside: that these can be imported at all is part of what is tested.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from pomarium.worker.selftest_rows import Begin, Event, Row, Verdict, fact

DEVICE, COMPILE, CHECK, TIME, MODEL, ENGINE, ENDPOINT = (
    "device", "compile", "check", "time", "model", "engine", "endpoint",
)  # fmt: skip
GRAPHS = "model, decode graphs"
"""A row of the section MODEL."""


def _device(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    import os

    from pomarium.worker import device, settings

    yield Begin(DEVICE)
    found = device.detect(settings.load(os.environ))
    yield Row(DEVICE, Verdict.OK, f"{found.kind} ({found.name})")
    if found.backend is device.GpuBackend.METAL:
        for name, value in device.gpu_facts().items():
            yield fact(f"MLX's {name}", value)


def _compile(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    from pomarium.worker import selftest_kernels

    return selftest_kernels.compiled(done)


def _check(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    from pomarium.worker import selftest_kernels

    return selftest_kernels.checked(done, given)


def _time(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    from pomarium.worker import selftest_kernels

    return selftest_kernels.timed(done)


def _model(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    from pomarium.worker import selftest

    yield Begin(MODEL)
    yield from selftest.run().rows()
    if selftest.has_graphs():
        yield Begin(GRAPHS)
        yield from selftest.run(graphs=True).rows(GRAPHS)


def _engine(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    from pomarium.cluster.selftest import engine

    return engine.events()


def _endpoint(done: Collection[str], given: Sequence[str]) -> Iterator[Event]:
    from pomarium.cluster.selftest import endpoint

    return endpoint.events()


SECTIONS: dict[str, Callable[[Collection[str], Sequence[str]], Iterator[Event]]] = {
    DEVICE: _device,
    COMPILE: _compile,
    CHECK: _check,
    TIME: _time,
    MODEL: _model,
    ENGINE: _engine,
    ENDPOINT: _endpoint,
}
"""Name -> (names of rows that are done, what the caller gives) -> events. CHECK is given the kernels that do not
compile."""
