"""Who waits, in which order, and who is refused."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.endpoint.turns import (
    BURST_S,
    CALM_S,
    GRACE_S,
    LEAST_WAITING,
    LONGEST_RETRY_S,
    Ahead,
    Held,
    Pace,
    Standing,
    Supply,
    Turns,
    batch_may_go,
    may_go,
    refusal,
)
from pomarium.cluster.replica.serve_plan import Queue

CLIENTS = st.sampled_from("abcd")
COUNTS = st.integers(0, 300)
SUPPLIES = st.builds(Supply, st.integers(1, 300), st.none(), COUNTS, st.integers(0, 4))
QUIET = Pace(None, 0.0, 0.0, bursts=True)


def filled(clients: list[str], tokens: int = 10) -> Turns[int]:
    turns: Turns[int] = Turns()
    for number, client in enumerate(clients):
        turns.add(client, number, tokens)
    return turns


def emptied(turns: Turns[int]) -> list[int]:
    return [request for _ in range(len(turns)) if (request := turns.pop()) is not None]


@given(st.lists(CLIENTS, max_size=60))
def test_each_goes_once_and_a_client_s_go_in_the_order_in_which_they_came(clients: list[str]) -> None:
    turns = filled(clients)
    order = emptied(turns)
    assert sorted(order) == list(range(len(clients)))
    for client in set(clients):
        assert (own := [n for n in order if clients[n] == client]) == sorted(own)
    assert (len(turns), turns.tokens, turns.pop()) == (0, 0, None)


@given(st.lists(CLIENTS, max_size=60), CLIENTS)
def test_what_is_said_to_be_ahead_is_what_goes_before(clients: list[str], client: str) -> None:
    turns = filled(clients)
    ahead = turns.ahead(client)
    turns.add(client, -1, 10)
    assert emptied(turns).index(-1) == ahead.requests
    assert ahead.tokens == 10 * ahead.requests


@given(st.lists(CLIENTS, max_size=60), st.lists(CLIENTS, max_size=200), CLIENTS)
def test_nobody_starves_whoever_comes_later(clients: list[str], later: list[str], client: str) -> None:
    """A client's request waits for as many of each other client's as it has before it itself, and for one more."""
    turns = filled(clients)
    own = clients.count(client)
    turns.add(client, -1, 10)
    gone = []
    for number, other in enumerate(later):
        turns.add(other, 1000 + number, 10)
        gone.append(turns.pop())
    gone += emptied(turns)
    assert gone.index(-1) <= own + (own + 1) * 3


@given(st.lists(CLIENTS, min_size=1, max_size=40), st.data())
def test_who_leaves_is_gone_and_disturbs_nobody(clients: list[str], data: st.DataObject) -> None:
    turns = filled(clients)
    left = data.draw(st.integers(0, len(clients) - 1))
    assert turns.drop(clients[left], left)
    assert not turns.drop(clients[left], left)
    order = emptied(turns)
    assert sorted(order) == [n for n in range(len(clients)) if n != left]
    assert turns.tokens == 0


@given(st.lists(CLIENTS, max_size=400), st.integers(0, 20))
def test_bounds_hold(clients: list[str], most: int) -> None:
    """One client alone has at most the bound waiting; N have 1 + 1/2 + ... times as much, and each has its place."""
    turns, queue, refused = Turns[int](), Queue(requests=most), set()
    for number, client in enumerate(clients):
        if refusal(turns.ahead(client), queue, Supply(4), QUIET) is None:
            turns.add(client, number, 10)
        else:
            refused.add(client)
    assert len(turns) <= sum(most // k for k in range(1, len(set(clients)) + 1)) + len(set(clients))
    if len(set(clients)) == 1:
        assert len(turns) == min(len(clients), most)
    assert refused <= set(clients)


def test_a_full_queue_of_one_client_has_a_place_for_another() -> None:
    turns, queue = filled(["a"] * 50), Queue(requests=50)
    assert refusal(turns.ahead("a"), queue, Supply(4), QUIET) is not None
    assert turns.ahead("b") == Ahead(1, 10)
    assert refusal(turns.ahead("b"), queue, Supply(4), QUIET) is None


def test_tokens_are_bound_too_and_no_request_is_refused_for_its_own_size() -> None:
    queue = Queue(tokens=1000)
    assert refusal(Ahead(0, 0), queue, Supply(4), QUIET) is None
    assert refusal(Ahead(1, 999), queue, Supply(4), QUIET) is None
    assert refusal(Ahead(1, 1000), queue, Supply(4), QUIET) is not None
    assert refusal(Ahead(1, 1000), Queue(), Supply(4, tokens=1000), QUIET) is not None
    assert refusal(Ahead(1, 1000), Queue(), Supply(4), QUIET) is None, "nothing is known of the caches"
    assert refusal(Ahead(LEAST_WAITING, 0), Queue(), Supply(4), QUIET) is not None
    assert refusal(Ahead(LEAST_WAITING, 0), Queue(), Supply(100), QUIET) is None


def test_what_may_have_to_wait_hangs_on_whether_it_comes_in_a_burst() -> None:
    burst, standing = (Pace(2.0, 3.0, 0.6, bursts) for bursts in (True, False))
    most = int(2 * BURST_S) - 1
    assert refusal(Ahead(most, 0), Queue(), Supply(8), burst) is None
    assert refusal(Ahead(most + 1, 0), Queue(), Supply(8), burst) == 1
    assert refusal(Ahead(0, 0), Queue(), Supply(8), standing) is None
    assert refusal(Ahead(1, 0), Queue(), Supply(8), standing) == 1
    assert refusal(Ahead(19, 0), Queue(), Supply(8), standing) == 10
    assert refusal(Ahead(19, 0), Queue(wait_s=10.0), Supply(8), standing) is None
    slow = Pace(0.1, 60.0, 2.0, bursts=True)
    assert refusal(Ahead(5, 0), Queue(), Supply(8), slow) is None, "as long as an answer takes"


@given(st.builds(Ahead, COUNTS, COUNTS), st.floats(0.001, 1e4), st.floats(0.0, 1e4), st.booleans())
def test_a_refusal_says_when_to_try_again(ahead: Ahead, per_s: float, answer_s: float, bursts: bool) -> None:
    found = refusal(ahead, Queue(), Supply(8, 100), Pace(per_s, answer_s, answer_s / 10, bursts))
    assert found is None or 1 <= found <= LONGEST_RETRY_S


def test_those_that_began_together_are_expected_to_end_together() -> None:
    ends = (1.0, 1.1, 1.2, 2.5)
    assert [Pace(8.0, 3.0, 0.4, False, ends).wait_s(ahead) for ahead in (0, 1, 3, 4, 99)] == [1.0, 1.1, 2.5, 2.5, 12.5]
    assert Pace(8.0, 3.0, 0.4, False, (0.0, 0.0)).wait_s(1) == 0.25, "no sooner than others did"
    assert refusal(Ahead(0, 0), Queue(), Supply(4), Pace(8.0, 3.0, 0.4, False, ends)) == 1
    assert refusal(Ahead(0, 0), Queue(), Supply(4), Pace(8.0, 3.0, 1.0, False, ends)) is None
    assert refusal(Ahead(0, 0), Queue(), Supply(4), Pace(0.01, 90.0, 1.0, True, (80.0,))) is None, "a burst's first"


def test_a_queue_that_stands_is_no_burst_until_it_was_calm() -> None:
    standing = Standing()
    assert standing.look(0.0, waiting=True)
    assert standing.look(GRACE_S, waiting=True)
    assert standing.look(GRACE_S + 0.1, waiting=False), "it was worked off"
    assert standing.look(10.0, waiting=True)
    assert not standing.look(10.1 + GRACE_S, waiting=True)
    assert not standing.look(12.5, waiting=False), "empty for a moment"
    assert not standing.look(13.0, waiting=True)
    assert not standing.look(13.1, waiting=False)
    assert standing.look(13.1 + CALM_S, waiting=True)


@given(SUPPLIES, COUNTS, COUNTS)
def test_an_ingress_has_its_share_and_no_more_than_that_where_all_is_used(
    supply: Supply, people: int, batches: int
) -> None:
    held = Held(people, batches)
    if held.all < supply.share:
        assert may_go(held, supply)
    if held.all + supply.elsewhere >= supply.slots and people >= supply.share:
        assert not may_go(held, supply)
    if batch_may_go(held, supply, people=True):
        assert batch_may_go(held, supply, people=False)
    if batch_may_go(held, supply, people=False):
        assert may_go(held, supply), "people go wherever a batch may"


@given(st.integers(2, 300))
def test_people_find_room_beside_a_batch(slots: int) -> None:
    supply, held = Supply(slots), Held(0, 0)
    while batch_may_go(held, supply, people=True):
        held = Held(0, held.batches + 1)
    assert 1 <= held.batches <= max(1, slots // 2)
    assert may_go(held, supply)
    full = Held(0, slots)
    assert not batch_may_go(full, supply, people=False)
    assert may_go(full, supply), "a batch that has everything gives way"


def test_shares_add_up() -> None:
    for slots, after in pairwise(range(1, 50)):
        assert Supply(slots, rivals=2).share * 3 <= max(3, slots)
        assert Supply(slots).share == slots < after
