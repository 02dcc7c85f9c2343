"""humming-kernels' own arrangement of a weight, on a CPU: its CUDA source, compiled by a C++ compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers_cuda import COMPILER
from torch import Tensor

FOUND = importlib.util.find_spec("humming")
needs_humming = pytest.mark.skipif(
    FOUND is None or COMPILER is None, reason="needs humming-kernels and a C++ compiler"
)

# Its headers but the one at hand want CUDA's. A block is one warp, whose threads first fill the shared memory: run one
# after the other, they do so in a first round, and what they write in a second one is right.
_SHIM = """
#include <cassert>
#include <cstdint>
#define PRAGMA_UNROLL
#define CUDA_INLINE inline
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) ((a + b - 1) / (b))
#define __global__
#define __shared__ static
static inline void __syncthreads() {}
static struct { uint32_t x, y, z; } threadIdx, blockIdx, blockDim = {32, 1, 1}, gridDim;
constexpr uint32_t static_next_power_of_2(uint32_t v) {
    uint32_t power = 1;
    while (power < v) power *= 2;
    return power;
}
"""
_PROGRAM = """
#include <humming/kernel/process.cuh>
template <int bits, bool folded>
void repack(const uint32_t* from, uint32_t* to, uint32_t n, uint32_t k) {
    gridDim = {n / 64, k / 64, 1};
    for (blockIdx.x = 0; blockIdx.x < n / 64; blockIdx.x++)
        for (blockIdx.y = 0; blockIdx.y < k / 64; blockIdx.y++)
            for (int round = 0; round < 2; round++)
                for (threadIdx.x = 0; threadIdx.x < 32; threadIdx.x++)
                    weight_repack_nk<bits, 16, true, folded, false, false, 0>(from, to, nullptr, n, k, n, k, 3);
}
extern "C" void repack_4(uint32_t* from, uint32_t* to, uint32_t n, uint32_t k) { repack<4, false>(from, to, n, k); }
extern "C" void repack_8(uint32_t* from, uint32_t* to, uint32_t n, uint32_t k) { repack<8, false>(from, to, n, k); }
extern "C" void repack_8_folded(uint32_t* from, uint32_t* to, uint32_t n, uint32_t k) {
    repack<8, true>(from, to, n, k);
}
"""


@cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="glmquant-humming-"))
    shim, program, library = folder / "humming/utils/all.cuh", folder / "repack.cpp", folder / "repack.so"
    shim.parent.mkdir(parents=True)
    shim.write_text(_SHIM)
    program.write_text(_PROGRAM)
    assert FOUND is not None
    assert FOUND.submodule_search_locations is not None
    theirs = Path(FOUND.submodule_search_locations[0]) / "include"
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{theirs}"]
    subprocess.run([str(COMPILER), *flags, str(program), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def repack(packed: Tensor, bits: int, folded: bool) -> Tensor:
    """What the package's kernel makes of codes in the layout of files, int32 [out, in*bits/32]."""
    rows, columns = packed.shape[0], packed.shape[1] * 32 // bits
    out = torch.empty(columns // 16, rows * bits // 2, dtype=torch.int32)
    name = f"repack_{bits}{'_folded' if folded else ''}"
    getattr(_library(), name)(
        ctypes.c_void_p(packed.data_ptr()), ctypes.c_void_p(out.data_ptr()), rows, columns
    )
    return out
