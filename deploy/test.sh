#!/usr/bin/env bash
# All tests, two parts at a time: those of racks beside those that start no server, and after these those of endpoints
# and engines. Racks are one part: two with README's addresses cannot be up at once. vLLM's engines are not tested in
# one process with units: they change what a process logs and which classes transformers knows.
#   deploy/test.sh MARKERS [pytest arguments]        MARKERS: as for pytest's -m, "" for all tests
# A part is made of folders, so that it reads its own files only. The racks' output comes as it runs, the others' when
# all are done, and what failed on racks comes once more at the end. Exit code: pytest's; 5 only if no part had a test
# to run. With a path below tests/ among the arguments there is one part.
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
        tests/rack/) echo racks ;;
        tests/e2e/ | tests/engine/) echo endpoints ;;
        *) echo units ;;
    esac
}

run() { # PART [pytest arguments]
    local part=$1 left_out=() niceness=0 folder
    shift
    # Units compute all the time, racks wait for deadlines: the former give way.
    [ "$part" != units ] || niceness=5
    for folder in tests/*/; do
        [ "$(part_of "$folder")" = "$part" ] || left_out+=("--ignore=$folder")
    done
    exec nice -n "$niceness" .venv/bin/python -m pytest "${left_out[@]}" -m "$markers" "$@"
}

beside() { # [pytest arguments]: both parts, whatever becomes of the first; ends the one that runs when it is ended
    local part child='' status
    trap 'kill $child 2>/dev/null; wait; exit 130' INT TERM
    for part in units endpoints; do
        (run "$part" "$@") >"$logs/$part" 2>&1 &
        child=$!
        wait "$child"
        status=$?
        echo "$status" >"$logs/$part.status"
    done
}

beside "$@" &
pid=$!
(run racks "$@") 2>&1 | tee "$logs/racks"
echo "${PIPESTATUS[0]}" >"$logs/racks.status"
wait "$pid"

for part in units endpoints; do
    echo "[test] the part '$part'"
    cat "$logs/$part"
done
if ! grep -qx '[05]' "$logs/racks.status"; then
    echo "[test] the part 'racks', once more from its first failure on"
    sed -nE '/^=* (FAILURES|ERRORS) =*$/,$p' "$logs/racks"
fi
status=5
for part in units endpoints racks; do
    read -r one <"$logs/$part.status"
    case "$status $one" in
        "5 "*) status=$one ;;
        "0 5") ;;
        "0 "*) status=$one ;;
    esac
done
exit "$status"
