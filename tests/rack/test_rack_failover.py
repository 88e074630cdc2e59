"""Twenty answers on a rack of three Macs with two engines: a Mac, or the head, is killed, frozen, drained."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from answers_compared import CASES, COMPLETIONS, TOOLS, Asked, Case, all_good, answers_of, ask_all, assert_same
from rack_serving import HEAL_S, Rack, command, serving

from pomarium.cluster.node import head_keeper, kin, ray_node

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL, TOKENS, STREAMS = "smollm2", 60, 20
KEPT = ["--keep-state"] if sys.platform.startswith("linux") else []


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    folder = tmp_path_factory.mktemp("rack")
    with serving(folder, folder, ["--simulate", "3", *KEPT], ["--replicas", "2", "--stages", "1", *TOOLS]) as rack:
        yield rack


def streams(rack: Rack) -> dict[str, Asked]:
    """STREAMS of them, begun."""
    asked = ask_all(rack.server.url, MODEL, TOKENS, stream=True)
    for number in range(STREAMS - len(CASES)):
        body = {"prompt": f"Chapter {number}.", "temperature": 0, "ignore_eos": True}
        asked[f"chapter {number}"] = one = Asked(rack.server.url, Case(COMPLETIONS, body), MODEL, TOKENS)
        one.start()
    assert all(one.begun.wait(120) for one in asked.values())
    return asked


@pytest.fixture(scope="module")
def quiet(rack: Rack) -> dict[str, Any]:
    return all_good(answers_of(streams(rack)))


def macs(rack: Rack) -> list[str]:
    """Those that two engines run on, once they do."""
    rack.until(lambda: rack.health()[0] == 200 and len(rack.status()["replicas"]) == 2, HEAL_S)
    return [replica["stages"][0]["mac"] for replica in rack.status()["replicas"]]


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_no_answer_ends_with_its_mac(rack: Rack, quiet: dict[str, Any], fault: str) -> None:
    mac, asked = macs(rack)[0], streams(rack)
    if fault == "killed":
        rack.simulated.kill(mac)
    else:
        rack.simulated.freeze(mac)
    assert_same(answers_of(asked), quiet)
    print(f"{fault}: the longest gap was {max(one.longest_gap_s for one in asked.values()):.1f} s")
    if fault == "frozen":
        rack.simulated.kill(mac)
    rack.simulated.rejoin(mac)


def test_a_mac_is_drained_and_comes_back(rack: Rack, quiet: dict[str, Any]) -> None:
    mac, asked = macs(rack)[0], streams(rack)
    said = command(rack.environ, "drain", mac)
    assert "engine(s) leave it" in said
    assert f"{mac} is free: its node has ended." in said
    assert state_of(rack, mac) == "drained"
    assert_same(answers_of(asked), quiet)
    print(f"drained: the longest gap was {max(one.longest_gap_s for one in asked.values()):.1f} s")
    assert mac not in macs(rack), "its engine is on the Mac that was free"
    assert f"{mac} has joined again" in command(rack.environ, "undrain", mac)
    assert state_of(rack, mac) == "alive"


def state_of(rack: Rack, mac: str) -> str:
    (found,) = [str(one["state"]) for one in rack.status()["macs"] if one["name"] == mac]
    return found


@pytest.mark.skipif(not KEPT, reason="Ray keeps the state of a head on Linux alone")
def test_a_head_that_ends_alone_comes_back_with_what_it_knew(rack: Rack, quiet: dict[str, Any]) -> None:
    macs(rack)
    before, asked = {replica["replica"] for replica in rack.status()["replicas"]}, streams(rack)
    rack_is = rack.simulated.current
    head = ray_node.kin_of(rack_is.nodes[0], rack_is.membership.session)
    (gcs,) = [process for process in kin.members(head) if process.name() == head_keeper.GCS]
    gcs.kill()
    assert_same(answers_of(asked), quiet)
    rack.until(lambda: rack.health()[0] == 200, HEAL_S)
    status = rack.status()
    assert {replica["replica"] for replica in status["replicas"]} == before, "engines were untouched"
    assert [mac["state"] for mac in status["macs"]] == ["alive"] * 3
    assert head_keeper.GCS in kin.names(head)
