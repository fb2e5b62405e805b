# shellcheck shell=bash
# Sourced by run.sh and two.sh in the repository's root: Python, packages, folders.
export DEVICE=${DEVICE:-cuda} OUT=${OUT:-tests/gpu/out}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
PYTHON=$(command -v "$PYTHON") || { echo "error: no Python; set PYTHON to one that has PyTorch" >&2; exit 2; }
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
export PYTHON
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
export WORK
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONUNBUFFERED=1
if [ "$DEVICE" = cpu ]; then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
else
  unset DS_ACCELERATOR
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$PYTHON" -c 'import torch' || { echo "error: $PYTHON has no PyTorch; set PYTHON to one that has" >&2; exit 2; }
if ! "$PYTHON" -c 'import deepspeed, jsonargparse, webdataset' >/dev/null 2>&1; then
  bundle=${BUNDLE:-tests/gpu/wheels}
  if ! ls "$bundle"/*.whl >/dev/null 2>&1; then
    echo "error: packages are missing, and there are no wheels in $bundle: bash tests/gpu/bundle.sh makes them where there is a network" >&2
    exit 2
  fi
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$WORK/site" "$bundle"/*.whl
  export PYTHONPATH=$WORK/site:$PYTHONPATH
fi
