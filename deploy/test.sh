#!/usr/bin/env bash
# All tests in three parts. Servers and racks wait much; beside them run the others and then vLLM's engines, which keep
# one core busy. Racks and endpoints are one part: two racks with README's addresses cannot be up at once, and two parts
# with workers would need more memory. Engines have a process of their own: they change what a process logs and which
# classes transformers knows.
#   deploy/test.sh MARKERS [pytest arguments]        MARKERS: as for pytest's -m, "" for all tests
# A part is made of folders, so that it reads its own files only. The servers' output comes as it runs, that of the rest
# when all are done, and what failed comes once more at the end. Exit code: that of the first part that failed; 5, no
# test was found, only if no part had one. With a path below tests/ among the arguments there is one part.
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
        tests/rack/ | tests/e2e/) echo servers ;;
        tests/engine/) echo engines ;;
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

kept() { # PART [pytest arguments]: its output and exit code go to files
    local part=$1 child status=0
    shift
    run 5 "$part" "$@" >"$logs/$part" 2>&1 &
    child=$!
    trap 'kill "$child" 2>/dev/null; wait "$child"; exit 143' TERM
    wait "$child" || status=$?
    echo "$status" >"$logs/$part.status"
}

(
    kept others "$@"
    kept engines "$@"
) &
pid=$!
(run 0 servers "$@") 2>&1 | tee "$logs/servers"
echo "${PIPESTATUS[0]}" >"$logs/servers.status"
wait "$pid"

for part in others engines; do
    echo "[test] the part '$part'"
    cat "$logs/$part"
done
found=5
for part in servers others engines; do
    status=$(cat "$logs/$part.status")
    case "$status" in
        0) [ "$found" -ne 5 ] || found=0 ;;
        5) ;;
        *)
            echo "[test] the part '$part', once more from its first failure on"
            sed -nE '/^=* (FAILURES|ERRORS) =*$/,$p' "$logs/$part"
            case "$found" in 0 | 5) found=$status ;; esac
            ;;
    esac
done
exit "$found"
