// Multiplying by packed weights on a CPU, a few rows of activations at a time: y = x @ W.T.
//
// A product with one row reads every weight once, so that its time is that of reading 4 or 8 bits per weight from
// memory, if unpacking them is cheap enough. Here that costs a shift and a table lookup for 16 weights:
//
//     packed   int32 [rows, words]   code + 2**(bits-1), lowest bits first: a word holds the codes of 8 (4) columns
//
//     columns  0..7    8..15   ...   120..127        one vector of words: a block
//     lane     0       1       ...   15
//
// Shifting the block by 4k bits brings column 8*lane + k to the low end of every lane, whence it is looked up as a
// float. So activations are transposed once for each product, to [block][k][lane]; then every step is a multiply-add
// of two vectors, and the sum over lanes comes last. A group's scale multiplies the sum of its block: as each lane
// belongs to one group, also where groups are shorter than blocks.

#include <vector>

#include "common.h"

extern "C" void glmquant_unpack_low_first(const uint8_t* packed, int64_t bytes, int8_t* codes);

namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <int kBits>
constexpr int kPerWord = 32 / kBits;

// The codes of column k of every word.
template <int kBits>
inline Lanes codes(Words words, int k) {
    if (kBits == 4) {
#if defined(__AVX512F__)
        const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return Lanes(_mm512_permutexvar_ps(__m512i(words >> (4 * k)), table));  // looks at four bits only
#else
        return __builtin_convertvector(Ints(words >> (4 * k) & 15) - 8, Lanes);
#endif
    }
    return __builtin_convertvector(Ints(words >> (8 * k) & 255) - 128, Lanes);
}

// Activations as the kernel reads them.
struct Activations {
    int64_t rows, blocks;
    std::vector<float> lanes;  // [row][block][k][lane]
    std::vector<float> sums;   // [row][group], only where there are zero points
};

template <int kBits>
Activations transposed(const float* x, int64_t rows, int64_t columns, int64_t groups, bool with_sums) {
    const int64_t block = kLanes * kPerWord<kBits>, blocks = (columns + block - 1) / block;
    Activations found{rows, blocks, std::vector<float>(size_t(rows * blocks * block)), {}};
    if (with_sums) found.sums.resize(size_t(rows * groups));
    const int64_t width = columns / groups;
    for (int64_t m = 0; m < rows; m++) {
        const float* in = x + m * columns;
        float* out = found.lanes.data() + m * blocks * block;
        for (int64_t c = 0; c < columns; c++) {
            int64_t within = c % block;
            out[c - within + within % kPerWord<kBits> * kLanes + within / kPerWord<kBits>] = in[c];
        }
        for (int64_t g = 0; with_sums && g < groups; g++) {
            double sum = 0.0;
            for (int64_t c = g * width; c < (g + 1) * width; c++) sum += in[c];
            found.sums[size_t(m * groups + g)] = float(sum);
        }
    }
    return found;
}

// A few rows of the weight, and their scales as the kernel reads them: one for each block, or, where groups are
// shorter than blocks, one for each lane of each block.
struct Weight {
    const uint32_t* packed;
    int64_t words;
    const float* scales;
    int64_t scales_per_row, scales_per_block;
};

// Adds a block of kTall rows of the weight times kMany rows of activations to `total`.
template <int kBits, int kTall, int kMany>
inline void add_block(const uint32_t* packed, int64_t stride, const float* x, int64_t x_stride, const Weight& weight,
                      int64_t b, Lanes (&total)[kTall][kMany]) {
    Words block[kTall];
    Lanes part[kTall][kMany] = {};
    for (int n = 0; n < kTall; n++) {
        std::memcpy(&block[n], packed + n * stride, sizeof block[n]);
        // Rows are too short for the processor's own prefetching to get going: ask for the rows after these.
        __builtin_prefetch(packed + (n + kTall) * stride);
    }
    for (int k = 0; k < kPerWord<kBits>; k++)
        for (int n = 0; n < kTall; n++) {
            Lanes code = codes<kBits>(block[n], k);
            for (int m = 0; m < kMany; m++)
                part[n][m] = multiply_add(code, load(x + m * x_stride + k * kLanes), part[n][m]);
        }
    for (int n = 0; n < kTall; n++) {
        const float* scales = weight.scales + n * weight.scales_per_row + b * weight.scales_per_block;
        Lanes scale = weight.scales_per_block == 1 ? lanes(*scales) : load(scales);
        for (int m = 0; m < kMany; m++) total[n][m] = multiply_add(part[n][m], scale, total[n][m]);
    }
}

// kTall rows of the weight times kMany rows of activations from `first` on.
template <int kBits, int kTall, int kMany>
void product(const Weight& weight, const Activations& x, int64_t first, float (*sums)[kMany]) {
    constexpr int64_t block = kPerWord<kBits> * kLanes;
    const int64_t whole = weight.words / kLanes, x_stride = x.blocks * block;
    const float* in = x.lanes.data() + first * x_stride;
    Lanes total[kTall][kMany] = {};
    for (int64_t b = 0; b < whole; b++)
        add_block<kBits, kTall, kMany>(weight.packed + b * kLanes, weight.words, in + b * block, x_stride, weight, b,
                                       total);
    if (whole < x.blocks) {  // the last block ends early; what is missing meets activations that are zero
        uint32_t rest[kTall][kLanes] = {};
        for (int n = 0; n < kTall; n++)
            std::memcpy(rest[n], weight.packed + n * weight.words + whole * kLanes,
                        size_t(weight.words - whole * kLanes) * sizeof(uint32_t));
        add_block<kBits, kTall, kMany>(rest[0], kLanes, in + whole * block, x_stride, weight, whole, total);
    }
    for (int n = 0; n < kTall; n++)
        for (int m = 0; m < kMany; m++) {
            float sum = 0.0f;
            for (int lane = 0; lane < kLanes; lane++) sum += total[n][m][lane];
            sums[n][m] = sum;
        }
}

// What product needs besides, and where its results go.
struct Operands {
    const void* scale;
    int scale_dtype;
    int64_t rows, groups, width;
    const int8_t* zero;
    float* y;
};

template <int kBits, int kTall, int kMany>
void add_rows(const Weight& weight, const Activations& x, const Operands& all, const float* stored, int64_t first_row,
              int64_t first) {
    float sums[kTall][kMany];
    product<kBits, kTall, kMany>(weight, x, first, sums);
    for (int n = 0; n < kTall; n++)
        for (int m = 0; m < kMany; m++) {
            float offset = 0.0f;
            const int8_t* zero = all.zero ? all.zero + (first_row + n) * all.groups : nullptr;
            for (int64_t g = 0; zero && g < all.groups; g++)
                offset += stored[n * all.groups + g] * float(zero[g]) * x.sums[size_t((first + m) * all.groups + g)];
            all.y[(first + m) * all.rows + first_row + n] = sums[n][m] - offset;
        }
}

// kTall rows of the weight, from `row` on, times all activations.
template <int kBits, int kTall>
void rows_of(Weight weight, const Activations& x, const Operands& all, int64_t row, std::vector<float>& stored,
             std::vector<float>& scales) {
    constexpr int64_t block = kPerWord<kBits> * kLanes;
    widen(all.scale, all.scale_dtype, row * all.groups, kTall * all.groups, stored.data());
    for (int n = 0; n < kTall; n++) {
        float* out = scales.data() + n * weight.scales_per_row;
        const float* in = stored.data() + n * all.groups;
        const int64_t step = weight.scales_per_block == 1 ? block : kPerWord<kBits>, end = x.blocks * block;
        int64_t group = 0, left = all.width;  // columns left in the group
        for (int64_t c = 0; c < end; c += step) {
            if (left <= 0 && group + 1 < all.groups) group++, left += all.width;
            *out++ = in[group];
            left -= step;
        }
    }
    weight.packed += row * weight.words;
    weight.scales = scales.data();
    int64_t m = 0;
    for (; m + 4 <= x.rows; m += 4) {
        if constexpr (kTall > 1) {  // four accumulators are enough for a pass over registers
            for (int n = 0; n < kTall; n++) {
                Weight one = weight;
                one.packed += n * weight.words;
                one.scales += n * weight.scales_per_row;
                add_rows<kBits, 1, 4>(one, x, all, stored.data() + n * all.groups, row + n, m);
            }
        } else {
            add_rows<kBits, 1, 4>(weight, x, all, stored.data(), row, m);
        }
    }
    for (; m + 2 <= x.rows; m += 2) add_rows<kBits, kTall, 2>(weight, x, all, stored.data(), row, m);
    for (; m < x.rows; m++) add_rows<kBits, kTall, 1>(weight, x, all, stored.data(), row, m);
}

template <int kBits>
void linear(const float* x, int64_t x_rows, int64_t columns, const uint32_t* packed, int64_t words,
            const Operands& all) {
    constexpr int64_t block = kPerWord<kBits> * kLanes, tall = 4;
    const Activations in = transposed<kBits>(x, x_rows, columns, all.groups, all.zero != nullptr);
    const int64_t per_block = all.groups == 1 || all.width % block == 0 ? 1 : kLanes;
    const Weight weight{packed, words, nullptr, in.blocks * per_block, per_block};
#pragma omp parallel
    {
        std::vector<float> stored(size_t(tall * all.groups)), scales(size_t(tall * weight.scales_per_row));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < all.rows; row += tall) {
            if (row + tall <= all.rows)
                rows_of<kBits, tall>(weight, in, all, row, stored, scales);
            else
                for (int64_t n = row; n < all.rows; n++) rows_of<kBits, 1>(weight, in, all, n, stored, scales);
        }
    }
}

}  // namespace

extern "C" void glmquant_linear(const float* x, int64_t x_rows, int64_t columns, const uint32_t* packed, int64_t rows,
                                int64_t words, int bits, const void* scale, int scale_dtype, int64_t groups,
                                const int8_t* zero, float* y) {
    const Operands all{scale, scale_dtype, rows, groups, columns / groups, zero, y};
    if (bits == 4)
        linear<4>(x, x_rows, columns, packed, words, all);
    else
        linear<8>(x, x_rows, columns, packed, words, all);
}

// Rows of a packed weight as half, bfloat16 or float32 [rows, columns]; the product of code and scale is rounded once.
extern "C" void glmquant_dequantize(const uint8_t* packed, int64_t rows, int64_t row_bytes, int bits, int64_t columns,
                                    const void* scale, int scale_dtype, int64_t groups, const int8_t* zero, void* out,
                                    int dtype) {
    const int64_t width = columns / groups;
#pragma omp parallel
    {
        std::vector<float> scales(static_cast<size_t>(groups)), values(static_cast<size_t>(columns));
        std::vector<int8_t> codes(size_t(row_bytes * 8 / bits));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            widen(scale, scale_dtype, n * groups, groups, scales.data());
            const uint8_t* in = packed + n * row_bytes;
            if (bits == 4)
                glmquant_unpack_low_first(in, row_bytes, codes.data());
            else
                for (int64_t i = 0; i < row_bytes; i++) codes[size_t(i)] = int8_t(in[i] ^ 128);
            for (int64_t g = 0; g < groups; g++) {
                const float step = scales[size_t(g)], offset = zero ? float(zero[n * groups + g]) : 0.0f;
                const int8_t* code = codes.data() + g * width;
                float* value = values.data() + g * width;
                for (int64_t c = 0; c < width; c++) value[c] = (float(code[c]) - offset) * step;
            }
            const float* value = values.data();
            uint16_t* narrow = static_cast<uint16_t*>(out) + n * columns;
            if (dtype == kFloat)
                std::memcpy(static_cast<float*>(out) + n * columns, value, size_t(columns) * sizeof(float));
            else if (dtype == kBfloat16)
                for (int64_t c = 0; c < columns; c++) narrow[c] = to_bfloat16(value[c]);
            else
                for (int64_t c = 0; c < columns; c++) narrow[c] = to_half(value[c]);
        }
    }
}
