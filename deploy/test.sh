#!/usr/bin/env bash
# All tests in three parts at once: racks and endpoints mostly wait, what starts neither keeps one core busy.
#   deploy/test.sh MARKERS [pytest arguments]        MARKERS: as for pytest's -m, "" for all tests
# A part is made of folders, so that it reads its own files only. The first part's output comes as it runs, the others'
# when all are done, and what failed comes once more at the end. Exit code: the first of pytest's that tells of a
# failure; 5 only if no part had a test to run. With a path below tests/ among the arguments there is one part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
markers=$1
shift
for argument in "$@"; do
    case "$argument" in tests/*) exec .venv/bin/python -m pytest -m "$markers" "$@" ;; esac
done
logs=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait; rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM

part_of() { # FOLDER
    case "$1" in
        tests/rack/) echo racks ;;
        tests/e2e/) echo endpoints ;;
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
pids+=($!)
(run 0 endpoints "$@") >"$logs/endpoints" 2>&1 &
pids+=($!)
(run 0 racks "$@") 2>&1 | tee "$logs/racks"
codes=("${PIPESTATUS[0]}")
for pid in "${pids[@]}"; do
    wait "$pid"
    codes+=($?)
done

for part in others endpoints; do
    echo "[test] the part '$part'"
    cat "$logs/$part"
done
result=5 part=0
for name in racks others endpoints; do
    code=${codes[part]}
    part=$((part + 1))
    if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then
        echo "[test] the part '$name', once more from its first failure on"
        sed -nE '/^=* (FAILURES|ERRORS) =*$/,$p' "$logs/$name"
        [ "$result" -ne 0 ] && [ "$result" -ne 5 ] || result=$code
    elif [ "$result" -eq 5 ]; then
        result=$code
    fi
done
exit "$result"
