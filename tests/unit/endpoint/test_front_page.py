"""The page as it leaves the ingress: who gets it, and what its headers let it do; tests/e2e/test_page.py opens it."""

import base64
import hashlib
import re

import pytest
from idle_ingress import asked

from pomarium.cluster.endpoint import front_page

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
KEYS = frozenset({"sk-4f1d"})


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain, application/json;q=0.9", ""])
def test_who_is_no_browser_finds_nothing(accept: str) -> None:
    answer = asked("/", accept=accept)
    assert (answer.status_code, answer.headers["vary"]) == (404, "Accept")
    assert answer.json() == {
        "error": {"message": "GET /: Not Found.", "type": "NotFoundError", "param": None, "code": 404}
    }


@pytest.mark.parametrize("keys", [frozenset[str](), KEYS])
def test_a_browser_gets_the_page_without_a_key_and_the_page_knows_if_it_takes_one(keys: frozenset[str]) -> None:
    answer = asked("/", keys, accept=BROWSER)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert (front_page.NEEDS_KEY in answer.text) == bool(keys)
    assert not any(key in answer.text for key in keys)


def test_what_runs_in_the_page_is_what_its_policy_names() -> None:
    answer = asked("/", accept=BROWSER)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "data:")
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (inside,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'", "and nothing else: neither 'self' nor 'unsafe-inline'"
    assert "page.css" not in answer.text
    assert "page.js" not in answer.text


def test_the_page_names_no_other_place() -> None:
    """Beside the names of XML's vocabularies, which nobody asks for anything."""
    content = asked("/", accept=BROWSER).text
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\w", content)) <= {"http://www.w3.org"}
