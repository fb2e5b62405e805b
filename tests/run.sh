#!/usr/bin/env bash
# Lint, types and tests in a fresh environment; more arguments go to pytest, e.g. bash tests/run.sh -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/make_venv.sh test
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
if [ "$#" -eq 0 ]; then
  set -- -m "not slow and not multinode"
fi
exec python -m pytest "$@"
