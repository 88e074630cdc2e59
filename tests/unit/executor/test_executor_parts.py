"""The executor's decisions: bundles, devices, the workers' environment, versions, and Futures put together."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.executor.bundles import PlacementError, worker_bundles
from pomarium.cluster.executor.codec import decode, encode, encode_call
from pomarium.cluster.executor.launch import check_versions
from pomarium.cluster.executor.link import Reply, gather
from pomarium.cluster.executor.service import ready
from pomarium.cluster.node.worker_environment import (
    VISIBLE_DEVICES,
    local_ranks,
    override_warning,
    parted,
    worker_environment,
)
from pomarium.worker import command_buffers
from pomarium.worker.address import authority
from pomarium.worker.errors import UnsupportedError


@given(st.lists(st.sampled_from("abc")))
def test_workers_of_a_node_get_distinct_devices_from_zero(nodes: list[str]) -> None:
    ranks = local_ranks(nodes)
    for node in set(nodes):
        own = [rank for rank, at in zip(ranks, nodes, strict=True) if at == node]
        assert own == list(range(len(own)))


def test_a_worker_gets_settings_and_its_device_but_not_the_engines_machine() -> None:
    engine = {
        "VLLM_METAL_DEBUG": "1",
        "HF_TOKEN": "t",
        "PYTHONPATH": "/p",
        VISIBLE_DEVICES: "7",
        "VLLM_HOST_IP": "10.0.0.1",
        "OMP_NUM_THREADS": "1",
        "HOME": "/home/a",
        "RAY_ADDRESS": "10.0.0.1:6379",
    }
    expected = {"VLLM_METAL_DEBUG": "1", "HF_TOKEN": "t", "PYTHONPATH": "/p", VISIBLE_DEVICES: "2"}
    assert worker_environment(engine, device=2) == expected


def test_a_worker_gets_the_users_command_buffers_and_sets_others_itself() -> None:
    """Those of an engine on another system they would be wrong; what a user sets is his for all machines."""
    engine: dict[str, str] = {}
    command_buffers.prepare(engine)
    assert set(worker_environment(engine, device=0)) == {VISIBLE_DEVICES}
    engine[command_buffers.MEGABYTES] = "7"
    assert worker_environment(engine, device=0)[command_buffers.MEGABYTES] == "7"


def test_secrets_are_parted_from_what_ray_shows_and_the_api_key_stays() -> None:
    engine = {"HF_TOKEN": "s1", "HUGGING_FACE_HUB_TOKEN": "s2", "MODELSCOPE_API_TOKEN": "s3", "VLLM_API_KEY": "s4",
              "HF_HOME": "/h", "VLLM_TOKENS_MAX": "5", "POMARIUM_API_KEY": "s5"}  # fmt: skip
    shown, secrets = parted(worker_environment(engine, device=0))
    assert shown == {"HF_HOME": "/h", "VLLM_TOKENS_MAX": "5", VISIBLE_DEVICES: "0"}
    assert sorted(secrets.values.values()) == ["s1", "s2", "s3", "s4"]
    assert not any(secret in repr(secrets) for secret in secrets.values.values())
    process = {"HF_HOME": "/h", "HF_TOKEN": "of the node"}
    pickle.loads(pickle.dumps(secrets)).enter(process)
    assert process == {"HF_HOME": "/h", **secrets.values}


@pytest.mark.parametrize(("value", "warned"), [(None, False), ("0,1", False), ("3", True), ("", True)])
def test_devices_set_by_hand_are_warned_of(value: str | None, warned: bool) -> None:
    environ = {} if value is None else {VISIBLE_DEVICES: value}
    warning = override_warning(environ, (0, 1))
    assert (warning is not None) == warned
    if warning is not None:
        assert f"{VISIBLE_DEVICES}={value} is overridden" in warning


def test_workers_take_the_bundles_that_offer_a_device() -> None:
    assert worker_bundles([{"CPU": 1}, {"CPU": 1, "mlx": 1}, {"mlx": 0.5}, {"mlx": 1}, {"mlx": 2}]) == (1, 3, 4)


def test_a_group_without_devices_is_refused_with_the_cure() -> None:
    with pytest.raises(PlacementError, match=r"no bundle with mlx: 1; add bundles such as"):
        worker_bundles([{"CPU": 1}])


@pytest.mark.parametrize("field", ["pomarium_version", "python_version"])
def test_another_version_is_refused(field: str) -> None:
    theirs = ready()
    setattr(theirs, field, "0.0")
    with pytest.raises(UnsupportedError, match=r"worker 1 runs \w+ 0\.0 but the engine runs"):
        check_versions("worker 1", theirs, ready())
    check_versions("worker 1", ready(), ready())


def test_gather_keeps_order_whatever_finishes_first() -> None:
    replies = [Reply(str(i), 1.0) for i in range(3)]
    future = gather(replies)
    for index in (2, 0, 1):
        assert not future.done()
        replies[index].set_result(index)
    assert future.result(0) == [0, 1, 2]


def test_gather_fails_with_the_first_error() -> None:
    replies = [Reply(str(i), 1.0) for i in range(3)]
    future = gather(replies)
    error = ValueError("second")
    replies[1].set_exception(error)
    assert future.exception(0) is error
    replies[0].set_result(0)
    replies[2].set_exception(ValueError("third"))
    assert future.exception(0) is error


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda x: st.lists(x) | st.tuples(x, x)))
def test_payloads_survive(value: Any) -> None:
    assert decode(encode(value)) == value
    assert decode(encode_call("m", (value,), {"k": value})) == ("m", (value,), {"k": value})


def test_what_plain_pickle_refuses_travels_by_value() -> None:
    assert decode(encode(lambda x: x + 1))(1) == 2


def test_ipv6_hosts_are_bracketed() -> None:
    assert authority("127.0.0.1", 5) == "127.0.0.1:5"
    assert authority("fe80::1", 5) == "[fe80::1]:5"
