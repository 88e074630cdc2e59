"""Whether llguidance compiles a constraint, found out with its own compiler over an alphabet of bytes.

vLLM asks only whether a grammar parses; one that then meets a limit of the compiler, or that admits no text, ends as an
answer that is empty. Here it is compiled and followed for a few bytes, which takes milliseconds and tells both. Bytes
stand for tokens: which tokens a model has changes masks, not grammars.
"""

import functools
import json
from typing import Any

import llguidance
from llguidance import LLMatcher

from pomarium.cluster.engine.intake.constraints import Constraint, Kind

REMEMBERED = 256
"""Constraints whose outcome is kept: programs ask with the same schema again and again."""

FOLLOWED = 12
"""Bytes of an answer that are tried: enough to stand within the first object, where its properties are told apart."""

OTHER_TAGS = (
    "structural tags other than of `structures` and `triggers` need another compiler: start the server with "
    "`--structured-outputs-config.backend xgrammar`."
)

_NOTHING = "NoExtensionBias"
"""How llguidance says that no byte goes on from here."""


def fault(constraint: Constraint, *, any_whitespace: bool = True) -> str | None:
    """Why nothing can be answered in the form of `constraint`; None if something can. Releases the GIL while it works.

    Args:
        constraint: one that `constraints.refusal` lets through, or this may take any time and memory. Of a structural
            tag only its form is looked at.
        any_whitespace: JSON may have white space between its parts (vLLM's disable_any_whitespace is off).
    """
    if constraint.kind is Kind.STRUCTURAL_TAG:
        return None if _is_known_tag(constraint.text) else f"`{constraint.param}`: {OTHER_TAGS}"
    reason = _fault(constraint.kind, constraint.text, any_whitespace)
    return None if reason is None else f"`{constraint.param}` cannot be answered: {reason}."


def _is_known_tag(text: str) -> bool:
    tag = json.loads(text)
    return isinstance(tag, dict) and isinstance(tag.get("structures"), list) and isinstance(tag.get("triggers"), list)


@functools.lru_cache(maxsize=REMEMBERED)
def _fault(kind: Kind, text: str, any_whitespace: bool) -> str | None:
    if kind is Kind.GRAMMAR and not text.strip():
        return "it is empty"
    try:
        grammar = _serialised(kind, text, any_whitespace)
    except (ValueError, TypeError, RecursionError) as error:
        return _brief(str(error))
    if invalid := LLMatcher.validate_grammar(grammar, None):
        return _brief(invalid)
    matcher = LLMatcher(_bytes(), grammar, log_level=0)
    for followed in range(FOLLOWED):
        admitted = _admitted(matcher)
        if matcher.is_error() and not matcher.get_error().startswith(_NOTHING):
            return _brief(matcher.get_error())
        if not admitted:
            return None if followed else "it admits no text"
        matcher.consume_token(min(admitted, key=_preference))
    return None


def _serialised(kind: Kind, text: str, any_whitespace: bool) -> str:
    """As vLLM's serialize_guidance_grammar does it."""
    if kind is Kind.JSON:
        grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": any_whitespace})
    else:
        grammar = llguidance.grammar_from(kind.value, text)
    return str(grammar)


@functools.cache
def _bytes() -> Any:
    return llguidance.LLTokenizer("byte")


def _admitted(matcher: Any) -> list[int]:
    """The bytes that may follow."""
    mask = matcher.compute_bitmask()
    return [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]


def _preference(byte: int) -> tuple[bool, bool, bool, int]:
    """Into objects, which have the most to tell apart, then strings; white space may go on for ever."""
    return byte != ord("{"), byte != ord('"'), byte <= ord(" "), byte


def _brief(message: str) -> str:
    """The first line of a compiler's message: those that follow quote the grammar."""
    first, _, _ = message.strip().partition("\n")
    return first[:300].rstrip(".:, ")
