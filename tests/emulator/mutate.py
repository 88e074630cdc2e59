"""Small faults for a kernel's text, one at a time: would the checks see them?

    body --mutants--> texts that differ in one place

Operators are those of faults that GPU kernels really have: a barrier that is missing or orders the wrong memory, an
index or a bound off by one, a neighbouring column of a table, a return before a barrier, a simd operation that half the
lanes skip, a write through const, a missing initialiser, a wrong address space.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

_COMMENT = re.compile(r"//[^\n]*")
_BARRIER = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\([^;]*\);")
_BOUND = re.compile(r" (<=?|>=?) (?=[\w(-])")
_INITIALISER = re.compile(r"^([ \t]*(?:float|int|uint|bool|uint4|float4|T) \w+) = [^;{]*;", re.MULTILINE)
_CLEARED = re.compile(
    r"(?<=[\s;{])[A-Za-z_]\w*(?:\[[^;=]*\])+ = (?:-?0(?:\.0f)?|-INFINITY|LOWEST|zero|make_filled[^;]*);"
)
_ADDRESS_SPACE = re.compile(r"\b(device|threadgroup) (?=[\w:]+(?:<[^>;]*>)?\s*\*|\w+ \w+\[)")
_SIMD_VALUE = re.compile(r"\bsimd_\w+\(")
_SIMD_ACTION = re.compile(r"\bsimdgroup_(?:load|store|multiply\w*)\(")
_NO_TYPE = {"return", "else", "case"}

HALF = "thread_index_in_simdgroup < 16u"


@dataclass(frozen=True)
class Mutant:
    """A changed body.

    Attributes:
        line: of the change, from 1. before, after: that line, without indentation. place: from 1, among the mutants of
            the operator whose lines read the same.
    """

    operator: str
    line: int
    before: str
    after: str
    text: str
    place: int = 1


def mutants(text: str, const_inputs: tuple[str, ...]) -> list[Mutant]:
    """All of them. const_inputs: the names of inputs that the kernel must not write."""
    code = _COMMENT.sub(lambda comment: " " * len(comment[0]), text)
    edits = [
        *_dropped_barriers(code),
        *_returns(code),
        *_divergences(code),
        *_indices(code),
        *_bounds(code),
        *_initialisers(code),
        *_address_spaces(code),
        *_writes(code, const_inputs),
    ]
    made: list[Mutant] = []
    places: Counter[tuple[str, str, str]] = Counter()
    for mutant in (_mutant(text, *edit) for edit in edits):
        lines = mutant.operator, mutant.before, mutant.after
        places[lines] += 1
        made.append(replace(mutant, place=places[lines]))
    return made


_Edit = tuple[str, int, int, str]
"""Operator, start and end of what is replaced, replacement."""


def _mutant(text: str, operator: str, start: int, end: int, new: str) -> Mutant:
    changed = text[:start] + new + text[end:]
    line = text.count("\n", 0, start)
    return Mutant(operator, line + 1, _line(text, line), _line(changed, line), changed)


def _line(text: str, index: int) -> str:
    return _COMMENT.sub("", text.split("\n")[index]).strip()


def _dropped_barriers(code: str) -> Iterator[_Edit]:
    for match in _BARRIER.finditer(code):
        yield "drop a barrier", match.start(), match.end(), ";"
        kept = re.sub(r"mem_flags::\w+", "mem_flags::mem_none", match[0])
        yield "a barrier that orders nothing", match.start(), match.end(), kept


def _returns(code: str) -> Iterator[_Edit]:
    for match in _BARRIER.finditer(code):
        yield "return before a barrier", match.start(), match.start(), "if (thread_index_in_simdgroup == 7u) return; "


def _divergences(code: str) -> Iterator[_Edit]:
    for match in _SIMD_VALUE.finditer(code):
        end = _closing(code, match.end() - 1) + 1
        call = code[match.start() : end]
        yield "diverge around a simd call", match.start(), end, f"({HALF} ? {call} : decltype({call})())"
    for match in _SIMD_ACTION.finditer(code):
        yield "diverge around a simd call", match.start(), match.start(), f"if ({HALF}) "


def _indices(code: str) -> Iterator[_Edit]:
    for start in (match.start() for match in re.finditer(r"\[", code)):
        end = _closing(code, start)
        name, is_declaration = _subscripted(code, start)
        if is_declaration or name == "thread_elements":
            continue
        yield "shift an index", end, end, " + 1"
        if "tables" in name:
            yield "a neighbouring column", start + 1, end, f"({code[start + 1 : end]}) ^ 1"
        column = re.search(r" \+ (\d+)$", code[start:end])
        if column:
            yield "a neighbouring column", start + column.start(1), end, str(int(column[1]) ^ 1)


def _subscripted(code: str, bracket: int) -> tuple[str, bool]:
    """The name before a chain of brackets, and whether a type stands before it."""
    at = bracket
    while code[at - 1] in "])":
        closing, depth = at - 1, 0
        for at in range(closing, -1, -1):
            depth += {"]": 1, ")": 1, "[": -1, "(": -1}.get(code[at], 0)
            if depth == 0:
                break
    name = re.search(r"(\w*)$", code[:at])
    assert name is not None
    before = re.search(r"(\w+|[>*]) $", code[: name.start()])
    return name[1], before is not None and before[1] not in _NO_TYPE and bool(re.match(r"[A-Za-z_>*]", before[1]))


def _bounds(code: str) -> Iterator[_Edit]:
    other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
    for match in _BOUND.finditer(code):
        if not code[code.rfind("\n", 0, match.start()) + 1 :].lstrip().startswith("constexpr"):
            yield "shift a bound", match.start(1), match.end(1), other[match[1]]


def _initialisers(code: str) -> Iterator[_Edit]:
    for match in _INITIALISER.finditer(code):
        yield "drop an initialiser", match.end(1), match.end() - 1, ""
    for match in _CLEARED.finditer(code):
        yield "drop an initialiser", match.start(), match.end() - 1, ""


def _address_spaces(code: str) -> Iterator[_Edit]:
    for match in _ADDRESS_SPACE.finditer(code):
        is_variable = "[" in code[match.end() : code.find(";", match.end())].split("*")[0]
        other = {"device": "threadgroup", "threadgroup": "thread" if is_variable else "device"}[match[1]]
        yield "change an address space", match.start(1), match.end(1), other


def _writes(code: str, const_inputs: tuple[str, ...]) -> Iterator[_Edit]:
    start = re.search(r"\S", code)
    assert start is not None
    for name in const_inputs:
        write = f"((device uint*){name})[0] = 0u; "
        yield "write through const", start.start(), start.start(), write


def _closing(code: str, opening: int) -> int:
    """Place of the bracket that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(code)):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(code[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"nothing closes {code[opening : opening + 40]!r}")
