#!/usr/bin/env bash
# Whether the package index has a wheel of each pin of requirements/macos-arm64.txt for macOS 15 on Apple silicon.
#
#   deploy/check_macos_wheels.sh [PYTHON ...]        versions such as 3.13; without any 3.11 to 3.14
#
# pip itself tells, on any system, in a dry run of that Mac's installation: it reads metadata and fetches no wheel.
# Network and index are what it waits for, so the versions are asked for side by side.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly pins=requirements/macos-arm64.txt platform=macosx_15_0_arm64
[ $# -gt 0 ] || set -- 3.11 3.12 3.13 3.14
wanted=$(grep -c == "$pins")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

ask() { # PYTHON
    .venv/bin/python -m pip --disable-pip-version-check --no-input install --dry-run --no-deps --only-binary :all: \
        --platform "$platform" --implementation=cp --python-version "$1" --target "$scratch/$1" \
        --requirement "$pins" >"$scratch/$1.log" 2>&1
}

would_install() { # PYTHON: the number of distributions
    sed -n 's/^Would install //p' "$scratch/$1.log" | wc -w
}

for version in "$@"; do
    ask "$version" &
    printf '%s\n' $! >"$scratch/$version.pid"
done
missing=0
for version in "$@"; do
    if wait "$(cat "$scratch/$version.pid")" && [ "$(would_install "$version")" -eq "$wanted" ]; then
        echo "Python $version: all $wanted pins have a wheel for $platform"
    else
        missing=1
        echo "Python $version: not all of the $wanted pins have a wheel for $platform:" >&2
        grep -E '^(ERROR|Would install)' "$scratch/$version.log" >&2 || tail -n 5 "$scratch/$version.log" >&2
    fi
done
exit $missing
