"""A rack that modules share."""

from collections.abc import Iterator

import pytest
from rack_serving import SharedRack
from sharing import share


@pytest.fixture(scope="session")
def four_macs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SharedRack]:
    """Started by the `ensure` of who uses it."""
    rack = SharedRack(tmp_path_factory.mktemp("four"), 4)
    share(request, rack.end)
    yield rack
    rack.end()
