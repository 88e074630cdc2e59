"""Every command line of the pages is run by the tests or named with a reason, and none is named that no page has."""

import re

import doc_lines
from doc_lines import Line, lines, planned


def test_every_line_is_run_or_has_a_reason() -> None:
    found = doc_lines.read()
    assert len(found) > 25
    assert [line for line in found if planned(line) is None] == []


def test_nothing_is_planned_for_lines_that_are_gone() -> None:
    texts = [line.text for line in doc_lines.read()]
    assert [pattern for pattern in doc_lines.PLAN if not any(re.fullmatch(pattern, text) for text in texts)] == []


def test_blocks_are_read_as_a_shell_would() -> None:
    page = "a\n```sh\nexport A=1   # why\n\n# all comment\ncurl x#y -d \\\n  '{\"#\": 1}' # z\n```\n```\nno\n```\n"
    assert list(lines("p", page)) == [
        Line("p", "export A=1"),
        Line("p", "curl x#y -d   '{\"#\": 1}'", ("export A=1",)),
    ]


def test_a_new_line_is_noticed() -> None:
    assert planned(Line("p", "pomarium rack explode")) is None
