#!/usr/bin/env bash
# Everything that needs a GPU in one command, in under 8 minutes: its tests, then the benchmarks. Writes JSON as it goes.
#
#     benchmarks/gpu/run.sh [FOLDER]        FOLDER: for gpu.json and tests.log, default benchmarks/results
#
# Needs torch, transformers and the repository: no network. What else is wanted, where it is missing, may lie as wheels
# in .whl/ (those of what is installed already are left alone):
#
#     pip download --no-deps -d .whl --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#         --platform manylinux_2_24_x86_64 pytest pluggy iniconfig pygments pytest-xdist execnet cpm_kernels click rich \
#         markdown-it-py mdurl nvidia-ml-py humming-kernels cuda-bindings cuda-pathfinder tabulate bitsandbytes
#
# (54 MiB, 41 of which are bitsandbytes: a peer, like humming-kernels.) PYTHON names the interpreter that has torch. With
# SANITIZE=1, some of the tests under compute-sanitizer instead.
set -uo pipefail
started=$SECONDS
out=$(realpath -m "${1:-$(dirname "$0")/../results}")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Compiled kernels go where one can write, and humming-kernels starts no compilers of its own accord.
export TRITON_CACHE_DIR=$site/triton HUMMING_CACHE_DIR=$site/humming HUMMING_TMP_DIR=$site/humming
export HUMMING_DISABLE_PARALLEL_BUILD=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/tests:$site/packages${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$site/packages" "$site/humming"
if compgen -G '.whl/*.whl' >/dev/null; then
    mapfile -t missing < <("$python" - .whl/*.whl <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
for wheel in sys.argv[1:]:
    try:
        version(Path(wheel).name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
END
    )
    [ ${#missing[@]} -eq 0 ] ||
        "$python" -m pip install --quiet --no-index --no-deps --target "$site/packages" "${missing[@]}" ||
        echo "some wheels could not be installed; what they are for is left out"
fi
# Not tests/conftest.py: it wants hypothesis, and turns Triton's interpreter on where there seems to be no GPU.
suite=("$python" -m pytest -q -m gpu -p no:cacheprovider --confcutdir tests/gpu tests/gpu)
if [ -n "${SANITIZE:-}" ]; then  # slow, so not all of them. Graphs need torch's allocator, which hides accesses beyond an end
    check=(compute-sanitizer --tool memcheck --error-exitcode 9)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 270 "${check[@]}" "${suite[@]}" -k "operands or packing or unpacked" 2>&1 |
        tee "$out/sanitizer.log"
    first=${PIPESTATUS[0]}
    timeout 200 "${check[@]}" "${suite[@]}" -k "in_a_cuda_graph or loop_is" 2>&1 | tee -a "$out/sanitizer.log"
    exit $((first | PIPESTATUS[0]))
fi
# Most of their time is compiling, which several processes share.
"$python" -c 'import xdist' 2>/dev/null && suite+=(-n 8)
timeout -k 5 130 "${suite[@]}" 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
"$python" -m benchmarks.gpu --tests "$tests" --seconds $((460 - SECONDS + started)) --out "$out/gpu.json"
measured=$?
[ "$tests" -eq 0 ] && [ "$measured" -eq 0 ]
