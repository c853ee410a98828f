#!/usr/bin/env bash
# Environments of the programs that benchmarks/peers compares ivg with, into build/peers (or the folder given). A plain torch pulls CUDA: it
# comes first, in the version that constraints.txt names.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/peers}
torch=$(grep -m1 '^torch==' constraints.txt)
make_environment() {
    name=$1
    shift
    test -x "$folder/$name/bin/python" || python3 -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$torch"
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" "$@"
}
make_environment genlm-control genlm-control==0.4.1
make_environment its_hub its-hub==1.2.0 transformers
