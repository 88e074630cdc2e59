"""What runs under macOS's bash 3.2, make 3.81 and BSD tools keeps to what those know: by rules, for none is here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy").rglob("*.sh"))
TEXTS = [*SCRIPTS, "Makefile"]

# What it is -> as it is written. Of macOS 15's manual pages; what is no command there is a word by itself.
GNU_ALONE = {
    "sed -i without a suffix": r"\bsed\b[^|;\n]*\s-\w*i\b(?! '')",
    "sed's \\| and \\+ of basic expressions": r"\bsed\b (?!-\w*[Er])[^|;\n]*'[^'\n]*\\[|+?]",
    "stat's formats": r"\bstat\b [^|;\n]*(-c|--format|--printf)\b",
    "readlink -e, -m": r"\breadlink\b[^|;\n]* -[em]\b",
    "date -d": r"\bdate\b [^|;\n]*(-d\b|--date)",
    "grep -P": r"\bgrep\b[^|;\n]* -\w*P",
    "find's -printf, -regextype, -readable": r"\bfind\b[^|;\n]* -(printf|regextype|readable|executable)\b",
    "xargs -d": r"\bxargs\b[^|;\n]* (-d\b|--)",
    "head or tail of all but n": r"\bhead\b[^|;\n]* -[nc] ?-\d|\btail\b[^|;\n]* --",
    "GNU options of cp, ln, mkdir, rm, mv": r"(?<![\w=-])(cp|ln|mkdir|rm|mv)\b [^|;\n]*(--\w|(?<=\s)-\w*[tT]\b)",
    "mktemp's long options": r"\bmktemp\b[^|;\n]* (--|-p)",
    "sort's -h and -V are late": r"\bsort\b[^|;\n]* -\w*[hV]",
    "df without -P": r"\bdf\b (?!-\w*P)",
    "du -b": r"\bdu\b[^|;\n]* -\w*b",
    "commands": r"(?m)(?:^|[|;&(]|\bthen|\bdo|\bexec)\s*"
    r"(timeout|nproc|flock|setsid|tac|sha256sum|md5sum|numfmt|ip|ss|free|getent|systemctl|apt-get)\s",
}
NEWER_THAN_BASH_3_2 = {
    "associative arrays, namerefs": r"\b(declare|local|typeset) -\w*[Ang]",
    "mapfile": r"\b(mapfile|readarray|coproc)\b",
    "case of letters": r"\$\{\w+(\[[^]]*\])?(\^|,)",
    "transformations": r"\$\{\w+(\[[^]]*\])?@\w\}",
    "|& and &>>": r"\|&|&>>",
    "wait -n": r"\bwait -[npf]",
    "a file descriptor's own name": r"exec \{\w+\}",
    "printf %(...)T": r"printf [^\n]*%\([^)\n]*\)T",
    "test -v": r"\[\[? -v ",
    "variables": r"\$\{?(EPOCHSECONDS|EPOCHREALTIME|BASHPID|SRANDOM)\b",
    "negative index or length": r"\$\{\w+\[-\d|\$\{\w+:[^}]*: -\d",
    "case in $(...), whose ) ends it": r"\$\(\s*case\b",
    "globstar, lastpipe, inherit_errexit": r"\bshopt\b[^\n]*(globstar|lastpipe|inherit_errexit)",
}
NEWER_THAN_MAKE_3_81 = {
    "!=": r"(?m)^\w+\s*!=",
    ".ONESHELL, undefine, $(file ...), private": r"^\.ONESHELL|^undefine|\$\(file |^private ",
    "grouped targets": r"&:",
    "::=": r"::=",
}


def without_comments(text: str) -> str:
    return re.sub(r"(?m)(^|\s)#.*$", "", text)


def breaches(name: str, text: str) -> list[str]:
    rules = GNU_ALONE | (NEWER_THAN_MAKE_3_81 if name == "Makefile" else NEWER_THAN_BASH_3_2)
    body = without_comments(text)
    return [f"{name}: {what}: {match[0].strip()}" for what, rule in rules.items() for match in re.finditer(rule, body)]


@pytest.mark.parametrize("name", TEXTS)
def test_scripts_keep_to_what_a_mac_s_tools_know(name: str) -> None:
    assert breaches(name, (ROOT / name).read_text(encoding="utf-8")) == []


BREACHES = r"""
sed -i s/a/b/ file
sed -n '/a\|b/p'
stat -c %s file
readlink -e x
date -d yesterday
grep -oP x
find . -printf %p
xargs -d ,
head -n -1
ln -sfT a b
cp --archive a b
mktemp -p /x
sort -V
df .
du -b x
timeout 5 true
cat x | sha256sum -
declare -A map
local -n x=y
mapfile -t x
echo "${name^^}"
echo "${name@Q}"
a |& b
wait -n
exec {fd}>x
[[ -v x ]]
echo $EPOCHSECONDS
x=$(case "$1" in a) echo b ;; esac)
echo "${x[-1]}"
printf '%(%s)T' -1
shopt -s globstar
"""


@pytest.mark.parametrize("line", BREACHES.strip().splitlines())
def test_each_rule_of_scripts_can_fail(line: str) -> None:
    assert len(breaches("x.sh", f"#!/bin/bash\n{line}\n")) == 1


@pytest.mark.parametrize("line", ["X != date", "a b &: c", "X ::= 1"])
def test_each_rule_of_make_can_fail(line: str) -> None:
    assert len(breaches("Makefile", f"{line}\n")) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    done = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_failed_is_found_again_without_gnu_s_sed() -> None:
    """deploy/test.sh shows the end of a long log anew, by an expression that both kinds of sed take."""
    text = (ROOT / "deploy/test.sh").read_text(encoding="utf-8")
    expression = re.search(r"sed (-nE '[^']+')", text)
    assert expression is not None
    posix = "--posix" if sys.platform == "linux" else ""  # GNU's without its own
    log = "=== test session ===\nx\n=========== FAILURES ===========\nwhy\n=== short ===\n"
    done = subprocess.run(
        ["bash", "-c", f"sed {posix} {expression[1]}"], input=log, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("=========== FAILURES")
    assert done.stdout.endswith("=== short ===\n")
