#!/usr/bin/env bash
# All tests in two halves at once: those that start no server keep one core busy, the others mostly wait.
#   deploy/test.sh MARKERS [pytest arguments]        MARKERS: as for pytest's -m, "" for all tests
# The first half's output comes when it is done, unless the other has failed: what failed comes last. Exit code:
# pytest's; 5 only if neither half had a test to run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
markers=${1:+" and ($1)"}
shift
logs=$(mktemp -d)
nice -n 5 .venv/bin/python -m pytest -m "not e2e$markers" "$@" >"$logs/others" 2>&1 &
half=$!
trap 'kill "$half" 2>/dev/null; rm -rf "$logs"' EXIT

.venv/bin/python -m pytest -m "e2e$markers" "$@" 2>&1 | tee "$logs/servers"
servers=${PIPESTATUS[0]}
wait "$half"
others=$?
echo "[test] the tests that start no server"
cat "$logs/others"
if [ "$servers" -ne 0 ] && [ "$servers" -ne 5 ]; then
    echo "[test] the tests that start servers, once more from their first failure on"
    sed -nE '/^=* (FAILURES|ERRORS) =*$/,$p' "$logs/servers"
fi
case "$servers $others" in
    "5 "*) exit "$others" ;;
    *" 5") exit "$servers" ;;
    "0 "*) exit "$others" ;;
    *) exit "$servers" ;;
esac
