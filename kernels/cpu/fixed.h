// Activations as integers, so that packed weights can be multiplied without turning them into floats first.
//
// Every block of 32 columns is written as integers times a scale, and an integer as signed bytes, a plane for each:
//
//     x = scale * (65536 b2 + 256 b1 + b0)        planes 1: b0;  2: b1, b0;  3: b2, b1, b0
//
// With two planes the scale is a power of two, and x is off by 2^-15 of the block's largest at most, which is nothing
// beside the rounding of a half; three are for float32 (2^-23). With one plane the error is 1/254 of the largest, as in
// llama.cpp's Q8_0: four times fewer operations than floats take, at a price in accuracy.
//
// A word of a packed row has the codes of 8 columns (4 of 8 bit). The instructions multiply bytes with bytes and add up
// four; the low and the high nibbles of a vector of words are two such operands, so bytes of x lie in that order:
//
//     plane of a row:  chunk 0 | chunk 1 | ...     a chunk: columns 0 2 4 .. of kLanes words, then 1 3 5 .. (4 bit)
//
// A code is stored without its sign, as code + 2^(bits-1). The difference is `offsets`, subtracted before scaling.

#pragma once

#include <vector>

#include "common.h"

namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Columns in a vector of words.
template <int kBits>
constexpr int64_t kChunk = kLanes * 32 / kBits;

// Columns that share a scale of x: 32, but for the shortest vectors.
template <int kBits>
constexpr int64_t kBlock = kChunk<kBits> < 32 ? kChunk<kBits> : 32;

inline Words load_words(const void* from) {
    Words loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

// The same, in a register: compilers like to load what they need twice twice.
inline Words kept(Words value) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(value));
#elif defined(__AVX2__)
    __asm__("" : "+x"(value));
#endif
    return value;
}

// sums + the products of four unsigned with four signed bytes in each lane. Unsigned ones are below 16 if kBits is 4.
template <int kBits>
inline Ints dot4(Ints sums, Words codes, Words x) {
#if defined(__AVX512VNNI__)
    return Ints(_mm512_dpbusd_epi32(__m512i(sums), __m512i(codes), __m512i(x)));
#elif defined(__AVX512BW__)
    if (kBits == 8) {  // pairs of products would not fit into 16 bits, those with half a byte do
        const __m512i low = _mm512_maddubs_epi16(__m512i(codes & 0x0f0f0f0f), __m512i(x));
        const __m512i high = _mm512_maddubs_epi16(__m512i(codes >> 4 & 0x0f0f0f0f), __m512i(x));
        return sums + Ints(_mm512_madd_epi16(low, _mm512_set1_epi16(1))) +
               Ints(_mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
    const __m512i pairs = _mm512_maddubs_epi16(__m512i(codes), __m512i(x));
    return sums + Ints(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    if (kBits == 8) {
        const __m256i low = _mm256_maddubs_epi16(__m256i(codes & 0x0f0f0f0f), __m256i(x));
        const __m256i high = _mm256_maddubs_epi16(__m256i(codes >> 4 & 0x0f0f0f0f), __m256i(x));
        return sums + Ints(_mm256_madd_epi16(low, _mm256_set1_epi16(1))) +
               Ints(_mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
    const __m256i pairs = _mm256_maddubs_epi16(__m256i(codes), __m256i(x));
    return sums + Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
    if (kBits == 8) {
        const int32x4_t high = vdotq_s32(int32x4_t{}, int8x16_t(codes >> 4 & 0x0f0f0f0f), int8x16_t(x));
        return Ints(vdotq_s32(int32x4_t(sums), int8x16_t(codes & 0x0f0f0f0f), int8x16_t(x))) + Ints(high) * 16;
    }
    return Ints(vdotq_s32(int32x4_t(sums), int8x16_t(codes), int8x16_t(x)));
#else
    for (int byte = 0; byte < 4; byte++)
        sums += Ints(codes >> (8 * byte) & 255) * (Ints(x << (24 - 8 * byte)) >> 24);
    return sums;
#endif
}

inline Lanes to_floats(Ints value) { return __builtin_convertvector(value, Lanes); }

struct Fixed {
    int64_t rows, planes, chunks, blocks;
    int64_t stride;               // bytes from one plane to the next
    std::vector<int8_t> bytes;    // [row][plane][stride], highest plane first
    std::vector<float> scales;    // [row][block]
    std::vector<int32_t> sums;    // [row][plane][block], of the bytes
    std::vector<float> wholes;    // [row][block], of the columns, as they are represented

    const int8_t* plane(int64_t row, int64_t p) const { return bytes.data() + (row * planes + p) * stride; }
};

// One block, with zeros after the end of a row, to integers; returns the scale.
template <int kPlanes, int64_t kBlock>
inline float to_integers(const float* values, int32_t* integers) {
    uint32_t top = 0;
    for (int64_t c = 0; c < kBlock; c++) {
        const uint32_t magnitude = bits_of(values[c]) & ~kSign;
        top = magnitude > top ? magnitude : top;
    }
    const float largest = float_of(top);
    float scale = 0.0f, inverse = 0.0f;
    if (top >= kInfinity) {
        scale = float_of(kNan);  // what is computed from it is no number either
    } else if (largest > 0x1p-100f) {
        if (kPlanes == 1) {
            scale = largest / 127.0f;
            inverse = 127.0f / largest;
        } else {
            // The largest power of two that keeps the highest byte below 128.
            const uint32_t exponent = bits_of(largest * 1.004f) >> 23;
            constexpr uint32_t high = kPlanes == 2 ? 14 : 22;
            scale = float_of((exponent - high) << 23);
            inverse = float_of((254 + high - exponent) << 23);
            if (exponent >= 254) scale = float_of(kNan);
        }
    }
    for (int64_t c = 0; c < kBlock; c++) integers[c] = int32_t(__builtin_rintf(values[c] * inverse));
    if (top >= kInfinity)
        for (int64_t c = 0; c < kBlock; c++) integers[c] = 0;
    return scale;
}

template <int kBits, int kPlanes>
void fix_row(const void* x, int dtype, int64_t columns, int64_t row, Fixed& to) {
    constexpr int64_t chunk = kChunk<kBits>, block = kBlock<kBits>, in_chunk = chunk / block;
    float* scales = to.scales.data() + row * to.blocks;
    float* wholes = to.wholes.data() + row * to.blocks;
    for (int64_t k = 0; k < to.chunks; k++) {
        float values[chunk];
        int32_t integers[chunk];
        const int64_t left = columns - k * chunk, count = left < chunk ? left : chunk;
        widen(x, dtype, row * columns + k * chunk, count, values);
        for (int64_t c = count; c < chunk; c++) values[c] = 0.0f;
        for (int64_t b = 0; b < in_chunk; b++) {
            scales[k * in_chunk + b] = to_integers<kPlanes, block>(values + b * block, integers + b * block);
            int32_t sum = 0;
            for (int64_t c = b * block; c < (b + 1) * block; c++) sum += integers[c];
            wholes[k * in_chunk + b] = float(sum) * scales[k * in_chunk + b];
        }
        for (int64_t p = kPlanes - 1; p >= 0; p--) {
            int8_t bytes[chunk];
            for (int64_t c = 0; c < chunk; c++) {
                bytes[c] = int8_t(integers[c]);
                integers[c] = (integers[c] - bytes[c]) >> 8;
            }
            int32_t* sums = to.sums.data() + (row * kPlanes + p) * to.blocks + k * in_chunk;
            for (int64_t b = 0; b < in_chunk; b++) {
                int32_t sum = 0;
                for (int64_t c = b * block; c < (b + 1) * block; c++) sum += bytes[c];
                sums[b] = sum;
            }
            int8_t* out = to.bytes.data() + (row * kPlanes + p) * to.stride + k * chunk;
            if (kBits == 8) {
                std::memcpy(out, bytes, chunk);
            } else {
                for (int64_t c = 0; c < chunk / 2; c++) out[c] = bytes[2 * c];
                for (int64_t c = 0; c < chunk / 2; c++) out[chunk / 2 + c] = bytes[2 * c + 1];
            }
        }
    }
}

template <int kBits, int kPlanes>
Fixed fixed(const void* x, int dtype, int64_t rows, int64_t columns) {
    Fixed made{rows, kPlanes, (columns + kChunk<kBits> - 1) / kChunk<kBits>, 0, 0, {}, {}, {}, {}};
    made.blocks = made.chunks * (kChunk<kBits> / kBlock<kBits>);
    made.stride = made.chunks * kChunk<kBits> + 64;  // rows that are 4096 bytes apart would all meet in one set of the cache
    made.bytes.resize(size_t(rows * kPlanes * made.stride));
    made.scales.resize(size_t(rows * made.blocks));
    made.sums.resize(size_t(rows * kPlanes * made.blocks));
    made.wholes.resize(size_t(rows * made.blocks));
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) fix_row<kBits, kPlanes>(x, dtype, columns, row, made);
    return made;
}

}  // namespace
