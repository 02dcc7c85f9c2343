// What the CPU kernels share: the 16-bit floats of checkpoints, and vectors as wide as registers are.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

enum Dtype { kHalf = 0, kBfloat16 = 1, kFloat = 2 };

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u, kNan = 0x7fc00000u;

// ---- Half and bfloat16. The exponent of a half starts 112 below that of a float32.

inline float from_half(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7fff) << 13;
    if (magnitude >= 0x7c00u << 13) return float_of(sign | magnitude | kInfinity);
    return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

// Round half to even; too large a value becomes infinity.
inline uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits & kSign, magnitude = bits ^ sign, half;
    if (magnitude >= bits_of(65536.0f)) {
        half = 0x7c00;
    } else if (magnitude < bits_of(0x1p-14f)) {
        // Subnormal halves are multiples of 2**-24, which is what float32 resolves next to 0.5.
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    return uint16_t(sign >> 16 | half);
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// `count` numbers of a dtype, from `start` on, as float32.
inline void widen(const void* weight, int dtype, int64_t start, int64_t count, float* out) {
    if (dtype == kFloat) {
        std::memcpy(out, static_cast<const float*>(weight) + start, size_t(count) * sizeof(float));
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(weight) + start;
    if (dtype == kBfloat16) {
        for (int64_t i = 0; i < count; i++) out[i] = float_of(uint32_t(in[i]) << 16);
        return;
    }
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < count; i++) out[i] = from_half(in[i]);
}

// `count` numbers, rounded to a dtype, to a place that begins at number `at`.
inline void narrow(const float* values, int64_t count, int dtype, int64_t at, void* to) {
    if (dtype == kFloat) {
        std::memcpy(static_cast<float*>(to) + at, values, size_t(count) * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(to) + at;
    if (dtype == kBfloat16) {
        for (int64_t i = 0; i < count; i++) out[i] = to_bfloat16(values[i]);
        return;
    }
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(values + i), 0));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), 0));
#endif
    for (; i < count; i++) out[i] = values[i] == values[i] ? to_half(values[i]) : 0x7e00;  // NaN stays one
}

// ---- Vectors, as wide as registers are: gcc would take wider ones apart.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline Lanes lanes(float value) { return value - Lanes{}; }

inline Lanes load(const float* from) {
    Lanes loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

// The sum over lanes, halves first: in the same order whatever made them.
inline float sum_of(Lanes value) {
    float parts[kLanes];
    std::memcpy(parts, &value, sizeof parts);
    for (int half = kLanes / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) parts[lane] += parts[lane + half];
    return parts[0];
}

// a * b + sum, rounded once where there is an instruction for it.
inline Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
#if defined(__AVX512F__)
    return Lanes(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(sum)));
#elif defined(__AVX__) && defined(__FMA__)
    return Lanes(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(sum)));
#else
    return a * b + sum;
#endif
}

}  // namespace
