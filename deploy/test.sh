#!/usr/bin/env bash
# All tests in two parts at once: those that start servers and racks wait much, the others keep one core busy. Racks and
# endpoints are one part: two racks with README's addresses cannot be up at once. vLLM's engines are in it, too: they
# change what a process logs and which classes transformers knows.
#   deploy/test.sh MARKERS [pytest arguments]        MARKERS: as for pytest's -m, "" for all tests
# A part is made of folders, so that it reads its own files only. The servers' output comes as it runs, the others' when
# both are done, and what failed comes once more at the end. Exit code: pytest's; 5 only if neither part had a test to
# run. With a path below tests/ among the arguments there is one part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
markers=$1
shift
for argument in "$@"; do
    case "$argument" in tests/*) exec .venv/bin/python -m pytest -m "$markers" "$@" ;; esac
done
logs=$(mktemp -d)
pid=''
trap 'kill $pid 2>/dev/null; wait; rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM

part_of() { # FOLDER
    case "$1" in
        tests/rack/ | tests/e2e/ | tests/engine/) echo servers ;;
        *) echo others ;;
    esac
}

run() { # NICENESS PART [pytest arguments]
    local niceness=$1 part=$2 left_out=() folder
    shift 2
    for folder in tests/*/; do
        [ "$(part_of "$folder")" = "$part" ] || left_out+=("--ignore=$folder")
    done
    exec nice -n "$niceness" .venv/bin/python -m pytest "${left_out[@]}" -m "$markers" "$@"
}

(run 5 others "$@") >"$logs/others" 2>&1 &
pid=$!
(run 0 servers "$@") 2>&1 | tee "$logs/servers"
servers=${PIPESTATUS[0]}
wait "$pid"
others=$?

echo "[test] the part 'others'"
cat "$logs/others"
if [ "$servers" -ne 0 ] && [ "$servers" -ne 5 ]; then
    echo "[test] the part 'servers', once more from its first failure on"
    sed -nE '/^=* (FAILURES|ERRORS) =*$/,$p' "$logs/servers"
fi
case "$servers $others" in
    "5 "*) exit "$others" ;;
    *" 5") exit "$servers" ;;
    "0 "*) exit "$others" ;;
    *) exit "$servers" ;;
esac
