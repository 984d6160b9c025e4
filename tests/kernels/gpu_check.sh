#!/usr/bin/env bash
# Runs the kernels' tests that need a CUDA device under compute-sanitizer: accesses out of bounds,
# races in shared memory, barriers. Takes the Python to run them with. Exits with 2 where there is
# no device or no compute-sanitizer.
set -euo pipefail

python=$1
cd "$(dirname "$0")/../.."

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu-check: $python finds no CUDA device. What can be checked without one, 'make test' does:" \
    "every kernel is compiled, and run on the CPU." >&2
  exit 2
}
"$python" -c 'import cupy, pytest, hypothesis' || {
  echo "gpu-check: install what is missing: pip install -e '.[engine,cuda13]' pytest hypothesis" >&2
  exit 2
}
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) || {
  echo "gpu-check: no compute-sanitizer on PATH or in CUDA_HOME; it comes with the CUDA toolkit" >&2
  exit 2
}

# Every tensor gets memory of its own, so that an access beyond its end is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck; do
  echo "gpu-check: $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 1 --print-limit 20 \
    "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels
done
