"""The emulator's build as a Mac's clang would have it, by Debian's clang."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build

FIBERS = (build.HEADERS / "fibers.h").read_text()
SUB, RET = bytes.fromhex("ff8302d1"), bytes.fromhex("c0035fd6")
"""`sub sp, sp, #160` and `ret`, little-endian: Arm Architecture Reference Manual, C6.2."""


STP, LDP = (0x2A4, 0x1B4), (0x2A5, 0x1B5)
"""Their upper ten bits, of general and of 64-bit floating-point registers."""


def test_a_kernel_is_linked_without_the_sanitizers_run_time_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Linux a shared object gets none anyway; Apple's linker is told of it by the driver."""
    clang = tmp_path / "clang++"
    clang.write_text(
        f"""#!/bin/sh
case " $* " in
    *" -c "*) ;;
    *-fsanitize*) echo "ld: cannot find libclang_rt.tsan_osx_dynamic.dylib" >&2; exit 1 ;;
esac
exec {build.compiler()} "$@"
"""
    )
    clang.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(clang))
    monkeypatch.setattr(build, "_folder", lambda: tmp_path)
    made = build.shared_object('extern "C" { void __tsan_init() {} int answer() { return 42; } }')
    assert made.parent == tmp_path
    assert ctypes.CDLL(str(made)).answer() == 42


def test_what_does_not_link_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_folder", lambda: tmp_path)
    twice = 'asm(".globl one\\none:\\n.globl two\\n.hidden two\\n.quad two\\n");'
    with pytest.raises(build.CompileError, match="two"):
        build.shared_object(twice)


def assembled(text: str, target: str, folder: Path) -> bytes:
    made = folder / "fibers.o"
    command = [build.compiler(), f"--target={target}", "-x", "assembler", "-c", "-", "-o", str(made)]
    subprocess.run(command, input=text, text=True, check=True)
    code = made.read_bytes()
    return code[code.index(SUB) : code.index(RET) + len(RET)]


@pytest.mark.parametrize("target", ["arm64-apple-macos15", *(["aarch64-linux-gnu"] if sys.platform == "linux" else [])])
def test_fibers_save_every_register_on_arm(target: str, tmp_path: Path) -> None:
    """Ten pairs, x19 to x30 and d8 to d15, kept and taken back; AAPCS64, 6.1."""
    arm = FIBERS.partition("#elif defined(__aarch64__)")[2]
    text = re.search(r'asm\(R"\((.*?)\)"\);', arm, re.DOTALL)
    assert text is not None
    code = assembled(text[1] + "\n", target, tmp_path)
    words = [int.from_bytes(code[at : at + 4], "little") for at in range(0, len(code), 4)]
    kept, taken = ([word & 0x3FFFFF for word in words if word >> 22 in pairs] for pairs in (STP, LDP))
    assert len(set(kept)) == 10
    assert kept == taken
    assert len(words) == 26
