#!/usr/bin/env bash
# Make .venv with the package and one of its extras (demo, test): bash launch/make_venv.sh EXTRA
# Run again, it only installs what changed. Used by launch/demo.sh and tests/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:?usage: bash launch/make_venv.sh demo|test}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: $python is not on PATH; install Python 3.10 or newer, or set PYTHON" >&2; exit 2; }
"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}; 3.10 or newer is needed (set PYTHON to one)")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("error: this Python can't make virtual environments; on Debian: apt-get install python3-venv")
PY
# DeepSpeed builds its shared-memory operator with it, for more than one process on a CPU.
command -v g++ >/dev/null || { echo "error: g++ is missing; on Debian: apt-get install g++" >&2; exit 2; }

[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=.venv/installed-$extra
if [ ! -f "$stamp" ] || [ setup.cfg -nt "$stamp" ] || [ launch/constraints.txt -nt "$stamp" ]; then
  echo "installing into .venv (about a minute) ..."
  # torch first and alone: any later requirement is then satisfied by it, and no second build is fetched.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt torch
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".[$extra]"
  touch "$stamp"
fi
