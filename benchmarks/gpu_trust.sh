#!/usr/bin/env bash
# What docs/trust.md promises and only a GPU can show: the same bits over 100 runs, errors up to 131,072
# positions, and no access out of bounds or to uninitialised memory (where compute-sanitizer is installed).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
status=0
cd /
"$python" -m pytest -q -p no:cacheprovider -m gpu "$root/tests/kernels/test_kernels_gpu_numbers.py" || status=1
"$python" "$root/benchmarks/numerics.py" --device cuda || status=1

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not installed: memcheck and initcheck were not run"
    exit $status
fi
# one allocation a tensor, so that an access behind its end is none to its neighbour
for tool in memcheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 "$sanitizer" --tool $tool --error-exitcode 9 --launch-timeout 0 \
        "$python" "$root/benchmarks/sanitized.py" || status=1
done
exit $status
