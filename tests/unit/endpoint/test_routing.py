"""Requests go to the replica that knows their prompt, unless it is too busy, silent or dead."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from pomarium.cluster.endpoint import ledger, prefix_router
from pomarium.cluster.endpoint.ledger import Ledger
from pomarium.cluster.endpoint.prefix_router import PrefixRouter
from pomarium.cluster.endpoint.routing import (
    LEAST_SHARE,
    MOST_EXCESS,
    PIECE,
    Candidate,
    NoReplicaError,
    PrefixTable,
    prefix_keys,
    rank,
    text_of,
)
from pomarium.cluster.http.prompts import SEPARATOR, prompt_text
from pomarium.cluster.replica.replica import Routing

PIECES = 20


def keys_of(path: str, fields: dict[str, Any]) -> tuple[int, ...]:
    return prefix_keys(text_of(path, fields))


candidates = st.lists(
    st.builds(
        Candidate,
        replica=st.integers(0, 50),
        load=st.integers(0, 30),
        matched=st.integers(0, PIECES),
        held=st.integers(0, 500),
        silent=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda c: c.replica,
)
texts = st.text(alphabet="abé ", max_size=4 * PIECE)


@given(candidates, st.sampled_from([0, PIECES]), st.integers())
def test_a_rank_names_known_replicas_once_per_group_and_somebody_if_there_is_anybody(
    found: list[Candidate[int]], pieces: int, seed: int
) -> None:
    groups = rank(found, pieces, Random(seed))
    assert all(groups)
    assert all(len(set(group)) == len(group) for group in groups)
    assert {name for group in groups for name in group} <= {c.replica for c in found}
    assert bool(groups) == bool(found)


@given(candidates, st.integers())
def test_silent_replicas_come_last_and_all_of_them(found: list[Candidate[int]], seed: int) -> None:
    groups = rank(found, PIECES, Random(seed))
    silent = {c.replica for c in found if c.silent}
    if silent:
        assert set(groups[-1]) == silent
    assert not silent & {name for group in groups[: -1 if silent else None] for name in group}


@given(candidates, st.integers())
def test_affinity_is_for_those_that_know_most_and_are_not_too_busy(found: list[Candidate[int]], seed: int) -> None:
    by_name = {c.replica: c for c in found if not c.silent}
    if not by_name:
        return
    first = [by_name[name] for name in rank(found, PIECES, Random(seed))[0]]
    least = min(c.load for c in by_name.values())
    eligible = [
        c
        for c in by_name.values()
        if c.matched >= LEAST_SHARE * PIECES and c.load - least <= MOST_EXCESS * c.matched / PIECES
    ]
    if eligible:
        assert {c.matched for c in first} == {max(c.matched for c in eligible)}
        assert all(c in eligible for c in first)
    else:
        assert len(first) == min(2, len(by_name))
    assert [c.load for c in first] == sorted(c.load for c in first)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=5), st.integers())
def test_new_prompts_never_go_to_the_busiest_of_several(loads: list[int], seed: int) -> None:
    """The power of two choices: of any two the less busy one."""
    found = [Candidate(i, load, 0, 0) for i, load in enumerate(loads)]
    chosen = rank(found, PIECES, Random(seed))[0][0]
    assert loads[chosen] < max(loads) or loads.count(max(loads)) > 1


def test_equally_busy_replicas_share_new_prompts_by_what_they_hold() -> None:
    found = [Candidate("full", 1, 0, 9), Candidate("empty", 1, 0, 2)]
    assert rank(found, PIECES, Random(0))[0] == ["empty", "full"]


@pytest.mark.parametrize(("busy", "chosen"), [(MOST_EXCESS, "knows"), (MOST_EXCESS + 1, "idle")])
def test_a_known_prompt_leaves_its_replica_when_that_is_much_busier(busy: int, chosen: str) -> None:
    found = [Candidate("knows", busy, PIECES, 0), Candidate("idle", 0, 0, 0)]
    assert rank(found, PIECES, Random(0))[0][0] == chosen


@given(texts, texts, texts)
def test_prompts_have_as_many_keys_in_common_as_whole_pieces(head: str, one: str, other: str) -> None:
    a, b = prefix_keys(head + one), prefix_keys(head + other)
    texts_in_common = next(
        (i for i, (x, y) in enumerate(zip(head + one, head + other, strict=False)) if x != y),
        min(len(head + one), len(head + other)),
    )
    keys_in_common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert keys_in_common == texts_in_common // PIECE


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 5), max_size=5))), st.lists(st.integers(0, 5)))
def test_a_table_knows_what_was_sent(sent: list[tuple[str, list[int]]], asked: list[int]) -> None:
    table: PrefixTable[str] = PrefixTable()
    for replica, keys in sent:
        table.learn(replica, keys)
    for replica in "ab":
        known = {key for name, keys in sent if name == replica for key in keys}
        assert table.held(replica) == len(known)
        assert all(key in known for key in asked[: table.matched(replica, asked)])
        assert table.matched(replica, asked) == len(asked) or asked[table.matched(replica, asked)] not in known


@given(st.lists(st.lists(st.integers(0, 40), max_size=8, unique=True), min_size=1))
def test_a_table_is_bounded_and_forgets_the_ends_of_the_oldest(sent: list[list[int]]) -> None:
    table: PrefixTable[str] = PrefixTable(8)
    for keys in sent:
        table.learn("a", keys)
        assert table.held("a") <= 8
    assert table.matched("a", sent[-1]) == len(sent[-1])


def test_the_beginning_of_a_prompt_outlives_its_end() -> None:
    table: PrefixTable[str] = PrefixTable(4)
    table.learn("a", [1, 2, 3])
    table.learn("a", [7, 8])
    assert table.matched("a", [1, 2, 3]) == 2


def test_replicas_that_are_gone_are_forgotten() -> None:
    table: PrefixTable[str] = PrefixTable()
    for name in "abc":
        table.learn(name, [1, 2])
    table.forget("a")
    table.keep({"a", "b"})
    assert [table.matched(name, [1, 2]) for name in "abc"] == [0, 2, 0]


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": c} for role, c in zip(["system", "user", "assistant"] * 3, contents, strict=False)
    ]


@given(st.lists(texts, min_size=2, max_size=6), st.integers(1, 5))
def test_a_conversation_begins_with_its_earlier_turns(contents: list[str], earlier: int) -> None:
    whole, before = prompt_text({"messages": turns(*contents)}), prompt_text({"messages": turns(*contents[:earlier])})
    assert whole.startswith(before)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": turns("a")}, {"messages": turns("a"), "tools": [{"type": "function"}]}),
        ({"messages": turns("a")}, {"messages": turns("a"), "cache_salt": "s"}),
        ({"messages": turns("a", [{"type": "text", "text": "b"}])}, {"messages": turns("a", "c")}),
        ({"messages": turns("ab", "c")}, {"messages": turns("a", "bc")}),
        ({"prompt": [1, 23]}, {"prompt": [12, 3]}),
        ({"prompt": ["a", "b"]}, {"prompt": ["ab"]}),
        ({"prompt": [[1, 2], [3]]}, {"prompt": [[1], [2, 3]]}),
    ],
)
def test_other_prompts_have_another_text(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert prompt_text(one) != prompt_text(other)


TOOLS = [{"name": "read", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}]


def agent_turn(count: int, protocol: str) -> dict[str, Any]:
    """A request of an agent that has called a tool `count` times: what it changes each time, and what it adds."""
    if protocol == "messages":
        said: list[Any] = [{"role": "user", "content": "do it"}]
        for i in range(count):
            call = {"type": "tool_use", "id": f"t{i}", "name": "read", "input": {"file": f"f{i}"}}
            result: dict[str, Any] = {"type": "tool_result", "tool_use_id": f"t{i}", "content": f"text {i}"}
            if i == count - 1:
                result["cache_control"] = {"type": "ephemeral"}  # on the last one, always
            said += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cch={count:05}"}
        system = [billing, {"type": "text", "text": "You are a coding agent." * 9, "cache_control": {"ttl": "1h"}}]
        return {"system": system, "messages": said, "tools": TOOLS}
    items: list[Any] = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "do it"}]}]
    for i in range(count):
        call = {"type": "function_call", "call_id": f"c{i}", "name": "read", "arguments": f'{{"file": "f{i}"}}'}
        items += [call, {"type": "function_call_output", "call_id": f"c{i}", "output": f"text {i}"}]
    return {"instructions": "You are a coding agent." * 9, "input": items if count else "do it", "tools": TOOLS}


@pytest.mark.parametrize("protocol", ["messages", "responses"])
def test_an_agent_s_turn_begins_with_its_earlier_ones(protocol: str) -> None:
    prompts = [prompt_text(agent_turn(count, protocol)) for count in range(5)]
    assert all(later.startswith(before) for before, later in pairwise(prompts))
    assert len(set(prompts)) == len(prompts)
    other = agent_turn(4, protocol) | {"tools": [{"name": "write"}]}
    assert not prompt_text(other).startswith(prompts[0])


def test_counting_tokens_leaves_nothing_in_a_cache() -> None:
    fields = agent_turn(4, "messages")
    assert keys_of("/v1/messages", fields)
    assert keys_of("/v1/responses", agent_turn(4, "responses"))
    assert keys_of("/v1/messages/count_tokens", fields) == ()


def test_token_ids_that_begin_alike_have_text_that_begins_alike() -> None:
    assert prompt_text({"prompt": [1, 2, 3]}).startswith(prompt_text({"prompt": [1, 2]}).rstrip(SEPARATOR))
    assert not prompt_text({"prompt": [1, 23]}).startswith(prompt_text({"prompt": [1, 2]}).rstrip(SEPARATOR))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["prompt", "messages", "role", "content", "tools", "cache_salt", "system", "input", "text", "type"]
                ),
                x,
            )
        ),
        max_leaves=20,
    )
)
def test_no_body_breaks_the_routing(value: Any) -> None:
    fields = value if isinstance(value, dict) else {"prompt": value, "messages": value}
    assert isinstance(keys_of("/v1/completions", fields), tuple)


def test_what_generates_nothing_has_no_keys() -> None:
    fields = {"prompt": "x" * 999}
    assert (keys_of("/tokenize", fields), len(keys_of("/v1/completions", fields))) == ((), 999 // PIECE)


class Replica:
    """What a router sees of a replica: it answers with its queue's length, or not at all."""

    max_ongoing_requests = 100

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("engine:m", "pomarium"))
        self.frozen = False

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.frozen:
            await asyncio.sleep(60)
        return 0


class Rack:
    """A PrefixRouter of Serve's and a clock."""

    def __init__(self, *names: str) -> None:
        self.now = 100.0
        self.router = PrefixRouter(
            DeploymentID("engine:m", "pomarium"),
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=lambda: self.now,
        )
        self.router._ledger = Ledger(lambda: self.now)  # not the process's, which another test has written to
        self.replicas = {name: Replica(name) for name in names}
        self.update(*names)

    def update(self, *names: str) -> None:
        self.router.update_replicas([self.replicas.setdefault(n, Replica(n)) for n in names])  # type: ignore[misc]

    async def send(self, prompt: str, taken: bool = True) -> str:
        """Route a request and let its replica take it; returns the replica's name."""
        routing = Routing(keys_of("/v1/completions", {"prompt": prompt}))
        metadata = RequestMetadata(request_id="r", internal_request_id=str(Random().random()), call_method="request")
        request = PendingRequest([routing, None], {}, metadata)
        chosen = await self.router._choose_replica_for_request(request)
        self.router.on_send_request(chosen.replica_id)
        if taken:
            (known,) = self.router._ledger.candidates("engine:m", [chosen.replica_id.unique_id], [])
            self.router.on_new_queue_len_info(chosen.replica_id, known.load)
            self.router.on_request_routed(request, chosen.replica_id, None)  # type: ignore[arg-type]
        return str(chosen.replica_id.unique_id)

    def end(self, name: str) -> None:
        self.router.on_request_completed(self.replicas[name].replica_id, "r")
        self.router.decrement_queue_len_cache(self.replicas[name].replica_id)


def routed(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type]


def test_serve_sends_users_of_a_system_prompt_to_one_replica_and_others_elsewhere() -> None:
    async def scenario() -> None:
        rack = Rack("a", "b")
        homes = {}
        for user in range(12):
            system = f"system {user % 4} " * 40
            name = await rack.send(f"{system}user {user}")
            assert homes.setdefault(system, name) == name
            rack.end(name)
        assert sorted(homes.values()) == ["a", "a", "b", "b"]

    routed(scenario)


def test_a_replica_that_has_too_much_to_do_loses_its_prompt() -> None:
    async def scenario() -> None:
        rack = Rack("a", "b")
        names = [await rack.send("x" * 999) for _ in range(2 * MOST_EXCESS + 4)]
        assert names[: MOST_EXCESS + 1] == [names[0]] * (MOST_EXCESS + 1)
        assert abs(names.count("a") - names.count("b")) <= MOST_EXCESS

    routed(scenario)


def test_without_a_replica_a_request_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_router, "FIRST_NEWS_S", 0.05)

    async def scenario() -> None:
        rack = Rack("a")
        rack.router.on_replica_actor_died(rack.replicas["a"].replica_id)
        with pytest.raises(NoReplicaError):
            await asyncio.wait_for(rack.send("x"), 1)
        rack.update()
        with pytest.raises(NoReplicaError):
            await asyncio.wait_for(rack.send("x"), 1)
        rack.update("b")
        assert await rack.send("x") == "b"

    routed(scenario)


def test_the_first_request_waits_for_news_of_the_controller() -> None:
    async def scenario() -> None:
        rack = Rack()
        rack.router._told.clear()
        sent = asyncio.create_task(rack.send("x"))
        await asyncio.sleep(0.05)
        rack.update("a")
        assert await sent == "a"

    routed(scenario)


def test_a_replica_that_died_is_forgotten() -> None:
    async def scenario() -> None:
        rack = Rack("a", "b")
        home = await rack.send("x" * 999)
        rack.end(home)
        rack.router.on_replica_actor_died(rack.replicas[home].replica_id)
        other = await rack.send("x" * 999)
        assert other != home
        rack.end(other)
        rack.update("a", "b")
        assert await rack.send("x" * 999) == other

    routed(scenario)


def test_a_frozen_replica_keeps_one_request_and_gets_no_more_until_it_answers() -> None:
    async def scenario() -> None:
        rack = Rack("a", "b")
        home = await rack.send("x" * 999)
        rack.end(home)
        rack.replicas[home].frozen = True
        assert await rack.send("x" * 999, taken=False) == home
        rack.now += ledger.SILENT_S + 0.1
        assert await rack.send("x" * 999) != home
        rack.now += ledger.SILENT_NO_MORE_S  # now Serve itself asks first
        assert await rack.send("y" * 999) != home
        rack.replicas[home].frozen = False
        rack.now += ledger.SILENT_NO_MORE_S
        assert home in {await rack.send("z" * 999), await rack.send("w" * 999)}

    routed(scenario)


def test_the_benchmark_counts_tokens_not_requests_and_gives_no_policy_anothers_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import routing as benchmark

    figures = [
        benchmark.Figures((benchmark.Answer(1.0, 100, 0),), 2.0, 0.1),
        benchmark.Figures((benchmark.Answer(3.0, 300, 300),), 4.0, 0.3),
    ]
    both = benchmark.together(figures)
    assert (both.cached_share, both.first_token(0.5), both.seconds, both.others) == (0.75, 1.0, 6.0, 0.3)
    assert "| Pomarium | 75% | 1.00 | 3.00 | 6.0 | 0.30 |" in benchmark.table({"Pomarium": both})
    options = argparse.Namespace(seed=0, systems=2, users=3, system_words=20)
    arrivals = {policy: benchmark.conversations(policy, options, 0) for policy in benchmark.POLICIES}
    systems = [{turns[0]["content"] for turns in arrivals[policy]} for policy in benchmark.POLICIES]
    assert [len(found) for found in systems] == [2, 2, 2]
    assert len(set().union(*systems)) == 6
