#!/usr/bin/env bash
# Kills, full disks, damaged files and other faults against real runs, with a table of what happened.
#
#   bash tests/faults/run.sh --rounds 20      20 kills at random moments besides the others; about 40 s a round on 2 cores
#
# Further arguments go to pytest. The environment is that of tests/run.sh. Faults of disks mount a small tmpfs, which needs root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export FAULT_ROUNDS=20
if [ "${1:-}" = "--rounds" ]; then
  FAULT_ROUNDS=${2:?"--rounds N"}
  shift 2
fi
bash launch/make_venv.sh test
export PATH="$PWD/.venv/bin:$PATH"
exec python -m pytest tests/faults -m slow -s "$@"
