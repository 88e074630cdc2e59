"""A Ray that is not there is named at once."""

import socket

import pytest

from pomarium.cluster import ray_address
from pomarium.cluster.serving import local_ray
from pomarium.cluster.serving.plan import ModelPlan, ServePlan
from pomarium.worker.errors import SettingsError


def test_a_listener_answers_until_it_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert ray_address.answers(address)
        assert ray_address.answers(f"ray://{address}")
    assert not ray_address.answers(address)
    assert ray_address.answers("auto"), "left to Ray"


@pytest.mark.timeout(20)
def test_joining_nothing_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    plan = ServePlan((ModelPlan("m"),))
    with pytest.raises(SettingsError, match=rf"^No Ray answers at RAY_ADDRESS={address}: start it or unset"):
        local_ray.join(address, plan)
