"""Servers and racks that several modules share: those modules run in a row, and what they share ends with the last.

a test's fixture: start it unless it runs; share(request, end) --> ended once no later test asks for it
"""

from collections.abc import Callable, Iterator

import pytest

NAMES = ("embedded_server", "guarded_server", "four_macs")
"""The fixtures, in the order in which their modules run: before all others."""
ENDS = pytest.StashKey[dict[str, Callable[[], None]]]()


def share(request: pytest.FixtureRequest, end: Callable[[], None]) -> None:
    """Call `end` once no later test asks for this fixture."""
    assert request.fixturename in NAMES, "its modules are not run in a row"
    request.config.stash.setdefault(ENDS, {})[request.fixturename] = end


def _used(item: pytest.Item) -> list[str]:
    return [name for name in NAMES if name in item.fixturenames] if isinstance(item, pytest.Function) else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules whose tests share something come first, each whole."""
    turn: dict[str, int] = {}
    for item in items:
        for name in _used(item):
            turn.setdefault(str(item.path), NAMES.index(name))
    items.sort(key=lambda item: turn.get(str(item.path), len(NAMES)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """After the test's and its module's own fixtures."""
    yield
    shared = item.config.stash.get(ENDS, {})
    if shared:
        items = item.session.items
        needed = {name for later in items[items.index(item) + 1 :] for name in _used(later)}
        for name in shared.keys() - needed:
            shared.pop(name)()
