"""Metal's text as C++: declarations change, what a kernel computes does not.

    MetalText --translate--> C++ for msl/*.h, with an entry `emu_run`
              --checkable--> C++ for clang's front end, with address spaces

Attributes in [[...]] go, function constants get values, threadgroup variables become places in one block of memory that
all threads of a threadgroup see, vectors of raw bits begin as not-a-numbers, and an entry calls the function with the
buffers and the thread's position.
"""

import re
from dataclasses import dataclass

_PREFIX = '#include "mlx/backend/metal/kernels/utils.h"\n#include "constructors.h"\n'

_ATTRIBUTE = re.compile(r"\[\[(?:[^\[\]]|\[(?!\[)[^\]]*\])*\]\]")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[function_constant\((\d+)\)\]\]\s*;")
_INSTANTIATION = re.compile(r"^\s*template\s+(?:\[\[[^;]*\]\]\s*)?decltype\([^;]*;\s*$", re.MULTILINE)
_UNROLL = re.compile(r"^\s*#pragma unroll[^\n]*", re.MULTILINE)
_THREADGROUP_VARIABLE = re.compile(
    r"\bthreadgroup\s+([A-Za-z_][\w:]*(?:<[^;<>]*>)?)\s+([A-Za-z_]\w*)\s*((?:\[[^\]]*\])*)\s*;"
)

_RAW_VARIABLE = re.compile(r"^[ \t]*uint[234]\s+(\w+)\s*(?:\[[^\]]*\]\s*)*;", re.MULTILINE)

_POINTER_CAST = re.compile(r"\(\s*((?:const\s+)?(?:device|threadgroup|constant|thread)\b[^()]*\*)\s*\)(?=\s*[\w(])")

_THREAD_INDEX = {
    "thread_index_in_threadgroup": "thread",
    "thread_index_in_simdgroup": "thread % emu::LANES",
    "simdgroup_index_in_threadgroup": "thread / emu::LANES",
    "simdgroups_per_threadgroup": "(emu::now.threads + emu::LANES - 1) / emu::LANES",
    "threads_per_simdgroup": "emu::LANES",
    "thread_execution_width": "emu::LANES",
}
_PLACES = {
    "thread_position_in_grid": "emu_global(thread)",
    "thread_position_in_threadgroup": "emu_local(thread)",
    "threadgroup_position_in_grid": "emu_place(emu::now.place)",
    "threads_per_threadgroup": "emu_place(emu::now.size)",
    "threadgroups_per_grid": "emu_place(emu::now.groups)",
    "threads_per_grid": "emu_place(emu::now.grid)",
}
_POSITIONS = _THREAD_INDEX | _PLACES
"""Attribute of a parameter, and the expression of its value."""


@dataclass(frozen=True)
class MetalText:
    """A kernel function in Metal's language.

    Attributes:
        function: its name. arguments: of its template, as `<float, 64>`; empty: of the explicit instantiation in the
            text, if any. constants: values of function constants, by name; 0 for others.
    """

    text: str
    function: str
    arguments: str = ""
    constants: tuple[tuple[str, int], ...] = ()

    @property
    def instance(self) -> str:
        """The template's arguments."""
        found = re.search(rf"decltype\({re.escape(self.function)}(<.*?>)\)", self.text)
        return self.arguments or (found[1] if found else "")

    @property
    def num_buffers(self) -> int:
        """One more than the highest index of a buffer."""
        return 1 + max(int(index) for index in re.findall(r"\[\[buffer\((\d+)\)", " ".join(_parameters(self))))


def translate(metal: MetalText) -> str:
    """C++ that runs on msl/.

    Raises:
        ValueError: a parameter has an attribute that this does not know.
    """
    values = ", ".join(_value(parameter) for parameter in _parameters(metal))
    # The entry's call instantiates the template. Unrolled loops would only take time to compile.
    text = _UNROLL.sub("", _INSTANTIATION.sub("", _plain(metal)))
    text = _THREADGROUP_VARIABLE.sub(r"EMU_THREADGROUP_VARIABLE(\1, \2, \3);", text)
    text = _RAW_VARIABLE.sub(r"\g<0> EMU_UNWRITTEN(\1);", text)
    entry = f"""
#include "entry.h"
static void emu_body(void* pointers, unsigned thread) {{
  void** b = (void**)pointers;
  {metal.function}{metal.instance}({values});
}}
extern "C" void emu_run(EmuLaunch* launch) {{ emu_launch(*launch, emu_body); }}
"""
    return f'{_PREFIX}#include "keywords_run.h"\n#line 1 "{metal.function}"\n{text}{entry}'


def checkable(metal: MetalText) -> str:
    """C++ for a look by the compiler, with address spaces; variables in threadgroup memory have to be static for it.

    clang takes casts written (device T*) from any address space to any; EMU_POINTER_CAST does not.
    """
    text = _THREADGROUP_VARIABLE.sub(r"static threadgroup \1 \2\3;", _plain(metal))
    asked = "" if _INSTANTIATION.search(text) else f"\ntemplate decltype({metal.function}{metal.instance}) "
    asked = f"{asked}{metal.function}{metal.instance};" if asked and metal.instance else ""
    text = _POINTER_CAST.sub(r"EMU_POINTER_CAST(\1)->*", text)
    return f'{_PREFIX}#include "keywords_check.h"\n#line 1 "{metal.function}"\n{text}{asked}'


def _plain(metal: MetalText) -> str:
    """Without comments, attributes and function constants; lines stay where they are."""
    constants = dict(metal.constants)
    text = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), metal.text)
    text = _CONSTANT.sub(lambda c: f"static const {c[1]} {c[2]} = {constants.get(c[2], 0)};", text)
    return _ATTRIBUTE.sub("", text)


def _parameters(metal: MetalText) -> list[str]:
    """The declarations of the function's parameters."""
    text = _COMMENT.sub("", metal.text)
    head = re.search(rf"\bvoid\s+{re.escape(metal.function)}\s*\(", text)
    if head is None:
        raise ValueError(f"no function {metal.function} in the text")
    parameters, depth, start = [], 1, head.end()
    for at in range(head.end(), len(text)):
        depth += {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}.get(text[at], 0)
        if depth == 0 or (depth == 1 and text[at] == ","):
            parameters.append(text[start:at].strip())
            start = at + 1
        if depth == 0:
            break
    return parameters


def _value(parameter: str) -> str:
    """What the entry passes for a parameter."""
    attribute = re.search(r"\[\[(\w+)(?:\((\d+)\))?", parameter)
    if attribute is None:
        raise ValueError(f"parameter without an attribute: {parameter}")
    if attribute[1] == "buffer":
        kind = "EmuReference" if "&" in parameter.split("[[")[0] else "EmuPointer"
        return f"{kind}{{b[{attribute[2]}]}}"
    if attribute[1] not in _POSITIONS:
        raise ValueError(f"the emulator does not know the attribute {attribute[1]}")
    return _POSITIONS[attribute[1]]
