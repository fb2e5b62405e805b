#!/usr/bin/env bash
# What only a GPU can show, in at most nine minutes: bash tests/gpu/run.sh [CHECK...]
#
# Results go to $OUT (tests/gpu/out): results.jsonl, a line for each check as it ends; table.txt; log.txt, all that was printed.
# Exit code 1: a check failed. DEVICE=cpu does the same with small sizes on a CPU. tests/gpu/README.md says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tests/gpu/prepare.sh
. tests/gpu/prepare.sh
exec "$PYTHON" -m tests.gpu.drive one "$@"
