// What the CUDA kernels share: numbers, eight weights at a time, and the layouts of packed codes.
//
// Nothing is included, so that NVRTC needs no headers. The same sources are compiled for a CPU in the tests
// (tests/cuda_shim.h), where kernels run one thread after the other. So there are no barriers, no shared memory and
// no talk between threads: a thread owns a group of weights, or eight of them.
//
// Roundings are part of what a kernel promises. Compile without contraction of a*b+c (-fmad=false), with subnormals
// (-ftz=false) and with true division (-prec-div=true), as glmquant/_cuda/source.py does.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Dtype { kHalf = 0, kBfloat16 = 1, kFloat = 2 };

// The bytes of eight columns c0 .. c7 of a row, in the order of their addresses; in each byte the high half is left.
//
//   kCodes            [  c0 ][  c1 ][  c2 ][  c3 ][  c4 ][  c5 ][  c6 ][  c7 ]   signed, of any bits; cpm's INT8
//   kNibbles          [c0 c1][c2 c3][c4 c5][c6 c7]                               signed, 4 bit; cpm's INT4
//   kWords    4 bit   [c1 c0][c3 c2][c5 c4][c7 c6]                               code + 8: compressed-tensors
//   kWords    8 bit   [  c0 ][  c1 ][  c2 ][  c3 ][  c4 ][  c5 ][  c6 ][  c7 ]   code + 128: compressed-tensors
//
// Rows of kWords are filled up with zero bits to whole words of four bytes.
enum Layout { kCodes = 0, kNibbles = 1, kWords = 2 };

__device__ inline u32 bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(u32 bits) { return __uint_as_float(bits); }

constexpr u32 kSign = 0x80000000u, kInfinity = 0x7f800000u;

__device__ inline bool is_finite(float value) { return (bits_of(value) & kInfinity) != kInfinity; }

// ---- 16-bit floats. Half has instructions of its own (the shim brings its own functions).

#ifdef __CUDA_ARCH__
__device__ inline float from_half(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

// Rounds half to even; too large a value becomes infinity.
__device__ inline u16 to_half(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif

__device__ inline u16 to_bfloat16(float value) {
    u32 bits = bits_of(value);
    if ((bits & ~kSign) > kInfinity) return 0x7fc0;  // NaN, which adding could turn into a number
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ inline float widen(u16 value, int dtype) {
    return dtype == kHalf ? from_half(value) : float_of(u32(value) << 16);
}

__device__ inline u16 narrow(float value, int dtype) { return dtype == kHalf ? to_half(value) : to_bfloat16(value); }

__device__ inline float load(const void* from, int dtype, i64 at) {
    return dtype == kFloat ? static_cast<const float*>(from)[at] : widen(static_cast<const u16*>(from)[at], dtype);
}

__device__ inline void store(void* to, int dtype, i64 at, float value) {
    if (dtype == kFloat)
        static_cast<float*>(to)[at] = value;
    else
        static_cast<u16*>(to)[at] = narrow(value, dtype);
}

// ---- Eight neighbours in a row, the unit of every access: 16 bytes of 16-bit weights, one word of 4-bit codes.

struct Eight {
    i64 row, at;  // at: the first column, a multiple of 8
    int count;    // 0: nothing
};

__device__ inline bool aligned(const void* pointer, int bytes) {
    return (reinterpret_cast<u64>(pointer) & (bytes - 1)) == 0;
}

// `count` weights (at most 8) from `at` on; the rest of `out` is 0.
__device__ inline void load8(const void* from, int dtype, i64 at, int count, float* out) {
    if (dtype == kFloat) {
        const float* in = static_cast<const float*>(from) + at;
        for (int i = 0; i < 8; i++) out[i] = i < count ? in[i] : 0.0f;
        return;
    }
    const u16* in = static_cast<const u16*>(from) + at;
    if (count == 8 && aligned(in, 16)) {
        const uint4 four = *reinterpret_cast<const uint4*>(in);
        const u32 words[4] = {four.x, four.y, four.z, four.w};
        for (int i = 0; i < 4; i++) {
            out[2 * i] = widen(u16(words[i]), dtype);
            out[2 * i + 1] = widen(u16(words[i] >> 16), dtype);
        }
        return;
    }
    for (int i = 0; i < 8; i++) out[i] = i < count ? widen(in[i], dtype) : 0.0f;
}

__device__ inline void store8(void* to, int dtype, i64 at, int count, const float* values) {
    if (dtype == kFloat) {
        float* out = static_cast<float*>(to) + at;
        for (int i = 0; i < 8; i++)
            if (i < count) out[i] = values[i];
        return;
    }
    u16* out = static_cast<u16*>(to) + at;
    u32 words[4];
    for (int i = 0; i < 4; i++)
        words[i] = u32(narrow(values[2 * i], dtype)) | u32(narrow(values[2 * i + 1], dtype)) << 16;
    if (count == 8 && aligned(out, 16)) {
        *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
    for (int i = 0; i < 8; i++)
        if (i < count) out[i] = u16(words[i / 2] >> 16 * (i % 2));
}

// ---- Codes. Where those of eight columns lie in a layout, and in how many bytes.

struct Place {
    i64 offset;
    int bytes, bits;  // bits: of each code as it is stored
};

__device__ inline Place place(int layout, int bits, i64 columns, const Eight& eight) {
    if (layout == kCodes) bits = 8;
    const int bytes = (eight.count * bits + 7) / 8;
    if (layout != kWords) return {(eight.row * columns + eight.at) * bits / 8, bytes, bits};
    return {eight.row * ((columns * bits + 31) / 32 * 4) + eight.at * bits / 8, (bytes + 3) / 4 * 4, bits};
}

__device__ inline int nibble_shift(int layout, int i) { return 4 * (layout == kNibbles ? i ^ 1 : i); }

__device__ inline void put8(void* packed, int layout, Place where, int count, const int* codes) {
    u32 words[2] = {0, 0};
    const int plus = layout == kWords ? 1 << (where.bits - 1) : 0;
    for (int i = 0; i < 8; i++) {
        u32 code = i < count ? u32(codes[i] + plus) : 0;
        if (where.bits == 4)
            words[0] |= (code & 15) << nibble_shift(layout, i);
        else
            words[i / 4] |= (code & 255) << 8 * (i % 4);
    }
    u8* out = static_cast<u8*>(packed) + where.offset;
    if (where.bytes == 8 && aligned(out, 8)) {
        *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
    } else if (where.bytes == 4 && aligned(out, 4)) {
        *reinterpret_cast<u32*>(out) = words[0];
    } else {
        for (int i = 0; i < 8; i++)
            if (i < where.bytes) out[i] = u8(words[i / 4] >> 8 * (i % 4));
    }
}

__device__ inline void get8(const void* packed, int layout, Place where, int* codes) {
    u32 words[2] = {0, 0};
    const u8* in = static_cast<const u8*>(packed) + where.offset;
    if (where.bytes == 8 && aligned(in, 8)) {
        const uint2 two = *reinterpret_cast<const uint2*>(in);
        words[0] = two.x, words[1] = two.y;
    } else if (where.bytes == 4 && aligned(in, 4)) {
        words[0] = *reinterpret_cast<const u32*>(in);
    } else {
        for (int i = 0; i < 8; i++)
            if (i < where.bytes) words[i / 4] |= u32(in[i]) << 8 * (i % 4);
    }
    for (int i = 0; i < 8; i++) {
        const u32 nibble = words[0] >> nibble_shift(layout, i) & 15, byte = words[i / 4] >> 8 * (i % 4) & 255;
        const u32 field = where.bits == 4 ? nibble : byte;
        const int half = 1 << (where.bits - 1);
        // an unsigned code less its offset; or the sign bit of a signed one, extended
        codes[i] = layout == kWords ? int(field) - half : int(field ^ half) - half;
    }
}

// ---- Which thread this is, and which eight columns are its own. A launch has fewer than 2**31 threads.

__device__ inline u32 thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline Eight my_eight(i64 rows, i64 columns) {
    const u32 per_row = u32((columns + 7) / 8), row = thread_index() / per_row;
    if (row >= rows) return {0, 0, 0};
    const i64 at = i64(thread_index() - row * per_row) * 8;
    return {row, at, columns - at < 8 ? int(columns - at) : 8};
}

// The scale and zero point of a column: groups share them.
struct Step {
    float scale;
    int zero;
};

__device__ inline Step step_of(const void* scale, int dtype, const signed char* zero, i64 groups, i64 width, i64 row,
                               i64 column) {
    const i64 at = row * groups + u32(column) / u32(width);
    return {load(scale, dtype, at), zero ? zero[at] : 0};
}
