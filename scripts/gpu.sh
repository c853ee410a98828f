#!/usr/bin/env bash
# gpu.sh OUT [--rehearse]: exactness and speed on a GPU of 80 GB in at most 8 minutes (benchmarks/gpu.py).
# Wants python3 with PyTorch, transformers, pytest and pytest-xdist, and no network: what else is needed comes from wheels/, which gpu_wheels.sh fills.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ]; then echo "usage: scripts/gpu.sh OUT [--rehearse]" >&2; exit 2; fi
python=${PYTHON:-python3} site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl
fi
if ! "$python" -c 'import importlib.metadata as m; m.version("ivg")' 2>/dev/null; then # ivg runs from src/, and asks which version it is
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
  mkdir "$site/ivg-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: ivg\nVersion: %s\n' "$version" > "$site/ivg-$version.dist-info/METADATA"
fi
export PYTHONPATH=$PWD/src:$PWD:$site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
"$python" -m benchmarks.gpu --out "$@"
