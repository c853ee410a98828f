#!/usr/bin/env bash
# gpu_wheels.sh [PYTHON_VERSION]: into wheels/ what ivg and its tests need beside PyTorch, transformers and pytest, of the versions in constraints.txt,
# for Linux on x86-64. For a machine without network: carry the folder along with the checkout. A few MB.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
python=${PYTHON:-python3}
tags=(); for tag in manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do tags+=(--platform "${tag}_x86_64"); done
rm -rf wheels
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${tags[@]}" -d wheels \
  -c constraints.txt pydantic typer rich annotated-types typing-inspection llguidance hypothesis sortedcontainers gguf peft accelerate
core=$(unzip -p wheels/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([^ ;]*\).*/\1/p')
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${tags[@]}" -d wheels "pydantic-core==$core"
du -sh wheels
