#!/usr/bin/env bash
# What two GPUs of one host show and one can't, in about five minutes: bash tests/gpu/two.sh
#
# Results go to $OUT (tests/gpu/out), as those of run.sh: results.jsonl, table.txt, log.txt. Exit code 1: a check failed. DEVICE=cpu does
# the same with two processes on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tests/gpu/prepare.sh
. tests/gpu/prepare.sh
if [ "$DEVICE" = cuda ] && [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ]; then
  echo "error: PyTorch sees no two GPUs here; DEVICE=cpu rehearses on a CPU" >&2
  exit 2
fi
exec "$PYTHON" -m tests.gpu.drive two "$@"
