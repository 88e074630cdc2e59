"""Workers that were started ahead of the engine reach it through the environment, in order, and nobody else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.executor.actor import Endpoint
from pomarium.cluster.executor.handover import offer, offered
from pomarium.cluster.executor.member import Contact, Member
from pomarium.cluster.node.worker_environment import HANDED_OVER, worker_environment

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
CONTACTS = st.builds(Contact, st.builds(Endpoint, TEXT, st.integers(1, 2**22), TEXT), TEXT)
LAYERS = st.none() | st.tuples(st.integers(0, 200), st.integers(0, 200))
MEMBERS = st.lists(st.builds(Member, CONTACTS, TEXT, TEXT, LAYERS, st.integers(1, 8)), min_size=1, max_size=4)


@given(MEMBERS)
def test_what_is_offered_is_taken_in_order_and_only_meanwhile(members: list[Member]) -> None:
    environ = {"HOME": "/home/a"}
    with offer(members, environ):
        assert offered(environ, len(members)) == tuple(members)
    assert environ == {"HOME": "/home/a"}


def test_an_engine_that_nobody_started_workers_for_starts_its_own() -> None:
    assert offered({}, 1) is None


def test_another_number_of_workers_is_an_error() -> None:
    environ: dict[str, str] = {}
    with (
        offer([Member(Contact(Endpoint("127.0.0.1:1", 1, "node"), "token"), "studio", "smollm2")], environ),
        pytest.raises(ValueError, match="of 2"),
    ):
        offered(environ, 2)


def test_a_failure_takes_the_offer_back() -> None:
    environ: dict[str, str] = {}
    with pytest.raises(KeyError), offer([], environ):
        raise KeyError
    assert environ == {}


def test_a_worker_learns_no_tokens_of_others() -> None:
    assert HANDED_OVER not in worker_environment({HANDED_OVER: "[]", "POMARIUM_API_KEY": "k"}, device=0)
