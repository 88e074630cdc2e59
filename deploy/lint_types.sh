#!/usr/bin/env bash
# mypy --strict over pomarium.*. The folders are mapped under `pomarium` by the build, which mypy does not read:
# links in build/typing show it the same tree, and its messages are written with the real paths.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tree=build/typing
mkdir -p "$tree/pomarium"
for layer in cluster worker kernels proto; do
    ln -sfn "../../../$layer" "$tree/pomarium/$layer"
done
MYPYPATH=$tree .venv/bin/mypy --namespace-packages --explicit-package-bases -p pomarium "$@" |
    sed "s|^$tree/pomarium/||"
