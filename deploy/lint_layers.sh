#!/usr/bin/env bash
# The layer rule of pyproject.toml ([tool.importlinter]). import-linter finds packages on the file system, not through
# the editable installation, and resolves links: it gets a copy of the tree under its installed name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tree=build/layers
rm -rf "$tree"
mkdir -p "$tree/pomarium"
cp -R cluster worker kernels proto "$tree/pomarium/"
PYTHONPATH=$tree .venv/bin/lint-imports --no-cache --no-logo "$@"
