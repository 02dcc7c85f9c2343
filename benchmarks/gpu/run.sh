#!/usr/bin/env bash
# Everything that needs a GPU in one command, in under 8 minutes: its tests, then the benchmarks. Writes JSON.
#
#     benchmarks/gpu/run.sh [FOLDER]        FOLDER: for gpu.json and tests.log, default benchmarks/results
#
# Needs the repository and nothing else: no network. Python packages that are missing (cpm_kernels, say) may lie as
# wheels in .whl/. PYTHON names the interpreter that has torch. With SANITIZE=1, some of the tests under
# compute-sanitizer instead.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../results}")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${SANITIZE:-}" ]; then  # slow, so not all of them
    timeout 540 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -m gpu -p no:cacheprovider \
        tests/gpu -k "operands or packing or in_a_cuda_graph or loop_is" 2>&1 | tee "$out/sanitizer.log"
    exit "${PIPESTATUS[0]}"
fi
timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
timeout 320 "$python" -m benchmarks.gpu --tests "$tests" --out "$out/gpu.json"
measured=$?
[ "$tests" -eq 0 ] && [ "$measured" -eq 0 ]
