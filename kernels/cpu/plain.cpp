// Multiplying a few rows of activations by a 16-bit weight that is not quantized, such as the output head's: y = x @ W.T + bias.
//
// At one row all that counts is to read the weight as fast as memory gives it. Products are added up in float32.
//
//     weight   half or bfloat16 [rows, columns]

#include <vector>

#include "common.h"

namespace {

constexpr int64_t kTall = 4;

inline Lanes load_wide(const uint16_t* from, int dtype) {
#if defined(__AVX512F__)
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (dtype == kHalf) return Lanes(_mm512_cvtph_ps(packed));
    return Lanes(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (dtype == kHalf) return Lanes(_mm256_cvtph_ps(packed));
    return Lanes(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
#else
    float values[kLanes];
    widen(from, dtype, 0, kLanes, values);
    return load(values);
#endif
}

// kTall rows of the weight times kMany rows of x, [m][columns].
template <int kDtype, int kMany>
void product(const uint16_t* weight, const float* x, int64_t columns, float (&sums)[kTall][kMany]) {
    Lanes total[kTall][kMany] = {};
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
        if (c % (2 * kLanes) == 0)
            for (int64_t n = 0; n < kTall; n++) __builtin_prefetch(weight + (n + kTall) * columns + c, 0, 2);
        for (int64_t n = 0; n < kTall; n++) {
            const Lanes row = load_wide(weight + n * columns + c, kDtype);
            for (int m = 0; m < kMany; m++)
                total[n][m] = multiply_add(row, load(x + m * columns + c), total[n][m]);
        }
    }
    for (int64_t n = 0; n < kTall; n++)
        for (int m = 0; m < kMany; m++) {
            sums[n][m] = sum_of(total[n][m]);
            for (int64_t rest = c; rest < columns; rest++) {
                float value;
                widen(weight + n * columns, kDtype, rest, 1, &value);
                sums[n][m] += value * x[m * columns + rest];
            }
        }
}

template <int kDtype, int kMany>
void rows_of(const float* x, int64_t first, int64_t columns, const uint16_t* weight, int64_t rows, int64_t row,
             const void* bias, void* y) {
    float sums[kTall][kMany];
    // The last rows begin earlier, so that there are always kTall.
    const int64_t start = row + kTall <= rows ? row : rows - kTall;
    product<kDtype, kMany>(weight + start * columns, x + first * columns, columns, sums);
    for (int64_t n = row - start; n < kTall; n++)
        for (int m = 0; m < kMany; m++) {
            float add = 0.0f;
            if (bias) widen(bias, kDtype, start + n, 1, &add);
            const float sum = sums[n][m] + add;
            narrow(&sum, 1, kDtype, (first + m) * rows + start + n, y);
        }
}

template <int kDtype>
void plain(const void* x, int64_t x_rows, int64_t columns, const uint16_t* weight, int64_t rows, const void* bias,
           void* y) {
    std::vector<float> in(size_t(x_rows * columns));
    widen(x, kDtype, 0, x_rows * columns, in.data());
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row += kTall) {
        int64_t m = 0;
        for (; m + 4 <= x_rows; m += 4) rows_of<kDtype, 4>(in.data(), m, columns, weight, rows, row, bias, y);
        for (; m + 2 <= x_rows; m += 2) rows_of<kDtype, 2>(in.data(), m, columns, weight, rows, row, bias, y);
        for (; m < x_rows; m++) rows_of<kDtype, 1>(in.data(), m, columns, weight, rows, row, bias, y);
    }
}

}  // namespace

// x, weight, bias (or null) and y have the same dtype, half or bfloat16; the weight has four rows or more.
extern "C" void glmquant_linear_16(const void* x, int dtype, int64_t x_rows, int64_t columns, const uint16_t* weight,
                                   int64_t rows, const void* bias, void* y) {
    (dtype == kHalf ? plain<kHalf> : plain<kBfloat16>)(x, x_rows, columns, weight, rows, bias, y);
}
