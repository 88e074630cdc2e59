"""Where a prompt left what was cached, and what was known and is gone."""

from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.executor import prompt_memory
from pomarium.cluster.executor.prompt_memory import Compared, PromptMemory

BLOCK = 4


def test_a_first_prompt_differs_from_nothing() -> None:
    assert PromptMemory(BLOCK).compared(range(10), 0) == Compared(10, 0, differs_at=0, evicted=0)


def test_the_next_turn_differs_behind_the_last_one() -> None:
    memory = PromptMemory(BLOCK)
    memory.compared(range(10), 0)
    assert memory.compared([*range(10), 99, 98], 8) == Compared(12, 8, differs_at=10, evicted=0)
    answered = [*range(10), 99, 98, 7, 7, 7, 7, 50]  # the answer was cached, too, and no prompt had it
    assert memory.compared(answered, 16) == Compared(17, 16, differs_at=16, evicted=0)


def test_a_change_in_the_middle_is_found_to_the_token() -> None:
    memory = PromptMemory(BLOCK)
    memory.compared(range(20), 0)
    changed = [*range(9), 77, *range(10, 20)]
    assert memory.compared(changed, 8) == Compared(20, 8, differs_at=9, evicted=0)


def test_what_was_evicted_is_told_from_what_differs() -> None:
    memory = PromptMemory(BLOCK)
    memory.compared(range(20), 0)
    memory.compared([5] * 20, 0)
    assert memory.compared([*range(20), 1, 2], 4) == Compared(22, 4, differs_at=20, evicted=16)
    assert memory.compared([*range(20), 1, 2], 20).evicted == 0
    assert memory.compared(range(20), 16) == Compared(20, 16, differs_at=20, evicted=0), "its last token is computed"


def test_an_empty_prompt() -> None:
    memory = PromptMemory(BLOCK)
    memory.compared([], 0)
    assert memory.compared([], 0) == Compared(0, 0, 0, 0)


TOKENS = st.lists(st.integers(0, 2), max_size=24)


@given(st.lists(TOKENS, max_size=6), TOKENS)
def test_it_is_the_longest_beginning_in_common(before: list[list[int]], prompt: list[int]) -> None:
    memory = PromptMemory(BLOCK)
    for one in before:
        memory.compared(one, 0)
    longest = max((n for one in before for n in range(len(prompt) + 1) if one[:n] == prompt[:n]), default=0)
    found = memory.compared(prompt, 0)
    assert found.differs_at == longest
    assert found.evicted % BLOCK == 0
    assert found.evicted <= longest


def test_what_it_keeps_is_bounded() -> None:
    memory = PromptMemory(BLOCK)
    for index in range(prompt_memory.MOST_PROMPTS + 1):
        memory.compared([index] * 8, 0)
    assert memory.compared([0] * 8, 0).differs_at == 0, "the oldest is forgotten"
    assert memory.compared([2] * 8, 0).differs_at == 8
    memory.compared(range(prompt_memory.MOST_TOKENS + 1), 0)
    assert memory.compared([2] * 8, 0).differs_at == 0
