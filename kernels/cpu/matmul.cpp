// Multiplying many rows of activations by a packed weight: y = x @ W.T + bias. Operands as in linear.cpp.
//
// Here the arithmetic counts, so codes are unpacked only once: for a panel of rows of the weight, into a buffer that
// stays in the second-level cache, four columns of a row in each lane. Bytes of x (fixed.h) meet all rows of the panel at
// once, and sums stay in registers for a block of 32 columns:
//
//     panel    [word][half][row]   four codes; the low nibbles of a word are its columns 0 2 4 6, the high ones 1 3 5 7
//
// The planes of x count as rows of their own: two of them take twice the time of one, and three three times.

#include "weight.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWide = 2, kRegisterRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int kWide = 1, kRegisterRows = 6;
#endif
constexpr int kPanel = kWide * kLanes;  // rows of the weight

// A square of words, [kLanes rows][kLanes columns] `stride` apart, turned: one vector for each column.
inline void turned(const uint32_t* from, int64_t stride, int64_t rows, int64_t columns, Words (&out)[kLanes]) {
    if (rows < kLanes || columns < kLanes) {
        uint32_t square[kLanes][kLanes] = {};
        for (int64_t r = 0; r < kLanes && r < rows; r++)
            for (int64_t c = 0; c < kLanes && c < columns; c++) square[c][r] = from[r * stride + c];
        for (int c = 0; c < kLanes; c++) out[c] = load_words(square[c]);
        return;
    }
#if defined(__AVX512F__)
    for (int r = 0; r < kLanes; r++) out[r] = load_words(from + r * stride);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int d = kLanes / 2; d; d /= 2) {  // swap the quarters of every square of 2d x 2d that are off its diagonal
        const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(d));
        // Lane j of the first: j of a, or j - d of b in the upper half. Of the second: j + d of a, or j of b.
        const __m512i first = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - d));
        const __m512i second = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(d)), upper, lane,
                                                     _mm512_set1_epi32(16));
        for (int r = 0; r < kLanes; r++) {
            if (r & d) continue;
            const __m512i a = __m512i(out[r]), b = __m512i(out[r + d]);
            out[r] = Words(_mm512_permutex2var_epi32(a, first, b));
            out[r + d] = Words(_mm512_permutex2var_epi32(a, second, b));
        }
    }
#else
    for (int c = 0; c < kLanes; c++)
        for (int r = 0; r < kLanes; r++) out[c][r] = from[r * stride + c];
#endif
}

// kPanel rows of a weight, unpacked.
template <int kBits>
struct Panel {
    static constexpr int kHalves = kBits == 4 ? 2 : 1;
    std::vector<uint32_t> codes;  // [word][half][row]
    std::vector<float> scales;    // [group][row]
    std::vector<float> zeros;     // [group][row], times the scale
    std::vector<float> stored;    // [group], of one row
    float bias[kPanel];

    Panel(const Weight& weight, int64_t words)
        : codes(size_t(words * kHalves * kPanel)),
          scales(size_t(weight.groups * kPanel)),
          zeros(weight.zero ? scales.size() : 0),
          stored(size_t(weight.groups)) {}

    void read(const Weight& weight, int64_t first) {
        const int64_t left = weight.rows - first, rows = left < kPanel ? left : kPanel;
        for (int64_t r = 0; r < kPanel; r += kLanes)
            for (int64_t w = 0; w < weight.words; w += kLanes) {
                Words column[kLanes];
                const int64_t high = rows - r, wide = weight.words - w;
                turned(weight.packed + (first + (high > 0 ? r : 0)) * weight.words + w, weight.words, high > 0 ? high : 0,
                       wide, column);
                for (int64_t c = 0; c < kLanes && c < wide; c++) {
                    uint32_t* out = codes.data() + (w + c) * kHalves * kPanel + r;
                    const Words low = kBits == 4 ? column[c] & 0x0f0f0f0f : column[c];
                    std::memcpy(out, &low, sizeof low);
                    const Words upper = column[c] >> 4 & 0x0f0f0f0f;
                    if (kHalves == 2) std::memcpy(out + kPanel, &upper, sizeof upper);
                }
            }
        for (int64_t r = 0; r < kPanel; r++) {
            bias[r] = 0.0f;
            if (r < rows && weight.bias) widen(weight.bias, weight.bias_dtype, first + r, 1, bias + r);
            const int64_t row = first + (r < rows ? r : 0);
            widen(weight.scale, weight.scale_dtype, row * weight.groups, weight.groups, stored.data());
            for (int64_t g = 0; g < weight.groups; g++) {
                scales[size_t(g * kPanel + r)] = stored[size_t(g)];
                if (weight.zero)
                    zeros[size_t(g * kPanel + r)] = -stored[size_t(g)] * float(weight.zero[row * weight.groups + g]);
            }
        }
    }
};

// kRows rows of x from `first` on times a panel.
template <int kBits, int kPlanes, int kRows>
void product(const Fixed& x, const Weight& weight, const Panel<kBits>& panel, int64_t first, float (*out)[kPanel]) {
    constexpr int kHalves = Panel<kBits>::kHalves, kRegisterRows = kRows * kPlanes;
    constexpr int kWords = kBlock<kBits> * kBits / 32, kInChunk = kChunk<kBits> / kBlock<kBits>;
    const int64_t blocks = (weight.columns + kBlock<kBits> - 1) / kBlock<kBits>, stride = x.stride;
    const int64_t in_group = weight.groups == 1 ? blocks : weight.width / kBlock<kBits>;
    const int8_t* const base = x.plane(first, 0);
    const int32_t* byte_sums = x.sums.data() + first * kPlanes * x.blocks;
    const float *x_scales = x.scales.data() + first * x.blocks, *wholes = x.wholes.data() + first * x.blocks;
    const uint32_t* codes = panel.codes.data();
    Lanes total[kRows][kWide] = {};
    for (int64_t b = 0, in = 0, group = 0; b < blocks; b++, in++) {
        if (in == in_group) in = 0, group++;
        Ints sums[kRegisterRows][kWide];
        for (int v = 0; v < kRegisterRows; v++)
            for (int n = 0; n < kWide; n++)
                sums[v][n] = Ints{} - (1 << (kBits - 1)) * byte_sums[v * x.blocks + b];
        const int8_t* from = base + b / kInChunk * kChunk<kBits> + b % kInChunk * kWords * 4;
#pragma GCC unroll 8
        for (int w = 0; w < kWords; w++)
#pragma GCC unroll 2
            for (int half = 0; half < kHalves; half++, codes += kPanel) {
                Words code[kWide];
                for (int n = 0; n < kWide; n++) code[n] = load_words(codes + n * kLanes);
#pragma GCC unroll 12
                for (int v = 0; v < kRegisterRows; v++) {
                    uint32_t four;
                    std::memcpy(&four, from + v * stride + half * kLanes * 4 + w * 4, sizeof four);
                    const Words bytes = four - Words{};
                    for (int n = 0; n < kWide; n++) sums[v][n] = dot4<kBits>(sums[v][n], code[n], bytes);
                }
            }
        const float* scales = panel.scales.data() + group * kPanel;
#pragma GCC unroll 12
        for (int r = 0; r < kRows; r++) {
            const float x_scale = x_scales[r * x.blocks + b];
            for (int n = 0; n < kWide; n++) {
                Ints low = sums[r * kPlanes + kPlanes - 1][n];
                if (kPlanes > 1) low += sums[r * kPlanes + (kPlanes > 1 ? kPlanes - 2 : 0)][n] << 8;
                Lanes sum = to_floats(low);
                if (kPlanes > 2) sum += to_floats(sums[r * kPlanes][n]) * 65536.0f;
                total[r][n] = multiply_add(sum, load(scales + n * kLanes) * x_scale, total[r][n]);
            }
        }
        if (weight.zero)
            for (int r = 0; r < kRows; r++)
                for (int n = 0; n < kWide; n++)
                    total[r][n] = multiply_add(load(panel.zeros.data() + group * kPanel + n * kLanes),
                                               lanes(wholes[r * x.blocks + b]), total[r][n]);
    }
    for (int r = 0; r < kRows; r++)
        for (int n = 0; n < kWide; n++) {
            const Lanes sum = total[r][n] + load(panel.bias + n * kLanes);
            std::memcpy(out[r] + n * kLanes, &sum, sizeof sum);
        }
}

template <int kBits, int kPlanes, int kRows>
void rows_of(const Fixed& x, const Weight& weight, const Panel<kBits>& panel, int64_t first_row, int64_t& m, void* y,
             int dtype) {
    const int64_t left = weight.rows - first_row, count = left < kPanel ? left : kPanel;
    for (; m + kRows <= x.rows; m += kRows) {
        float out[kRows][kPanel];
        product<kBits, kPlanes, kRows>(x, weight, panel, m, out);
        for (int r = 0; r < kRows; r++) narrow(out[r], count, dtype, (m + r) * weight.rows + first_row, y);
    }
}

template <int kBits, int kPlanes>
void matmul(const void* from, int dtype, int64_t rows, const Weight& weight, void* y) {
    constexpr int many = kRegisterRows / kPlanes, some = many / 2;
    const Fixed x = fixed<kBits, kPlanes>(from, dtype, rows, weight.columns);
    const int64_t words = x.blocks * kBlock<kBits> * kBits / 32;
#pragma omp parallel
    {
        Panel<kBits> panel(weight, words);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < weight.rows; row += kPanel) {
            panel.read(weight, row);
            int64_t m = 0;
            rows_of<kBits, kPlanes, many>(x, weight, panel, row, m, y, dtype);
            rows_of<kBits, kPlanes, some>(x, weight, panel, row, m, y, dtype);
            rows_of<kBits, kPlanes, 1>(x, weight, panel, row, m, y, dtype);
        }
    }
}

}  // namespace

// planes: see fixed.h. `y` has the dtype of `x`.
extern "C" void glmquant_matmul(const void* x, int dtype, int64_t x_rows, int64_t columns, const uint32_t* packed,
                                int64_t rows, int64_t words, int bits, const void* scale, int scale_dtype,
                                int64_t groups, const int8_t* zero, const void* bias, int bias_dtype, int planes,
                                void* y) {
    const Weight weight{packed, rows, words, columns, groups, columns / groups, scale, scale_dtype, zero, bias, bias_dtype};
    if (bits == 4)
        (planes == 1 ? matmul<4, 1> : planes == 2 ? matmul<4, 2> : matmul<4, 3>)(x, dtype, x_rows, weight, y);
    else
        (planes == 1 ? matmul<8, 1> : planes == 2 ? matmul<8, 2> : matmul<8, 3>)(x, dtype, x_rows, weight, y);
}
