// What CUDA supplies and a C++ compiler for a CPU does not, so that kernels/cuda can be compiled and run there, one
// thread after the other.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__

struct Index {
    unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx, blockDim;

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The compiler's own half (gcc 12, clang 15), which rounds to even as the GPU's conversions do.
inline float from_half(unsigned short half) {
    _Float16 value;
    std::memcpy(&value, &half, sizeof value);
    return value;
}

inline unsigned short to_half(float value) {
    _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}
