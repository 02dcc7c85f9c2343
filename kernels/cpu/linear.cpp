// Multiplying a few rows of activations by a packed weight: y = x @ W.T + bias.
//
// A product with one row reads every weight once, so that its time is that of reading 4 or 8 bits per weight from
// memory, if the arithmetic is cheap enough. Here 128 weights of 4 bit cost a shift, two masks, two multiplications of
// bytes for each plane of x (fixed.h), and five instructions that turn their sums into a float and scale it.
//
//     packed   int32 [rows, words]   code + 2**(bits-1), lowest bits first: a word holds the codes of 8 (4) columns
//     scale    half, bfloat16 or float32 [rows, groups]; a group is a multiple of 32 columns, or the row
//     zero     int8 [rows, groups], or null
//
// Every thread has its part of the rows, and adds up in the same order however many there are.

#include "weight.h"

extern "C" void glmquant_unpack_low_first(const uint8_t* packed, int64_t bytes, int8_t* codes);

namespace {

// Activations, and what goes with each lane of each of their chunks.
template <int kBits, int kPlanes>
struct Operand {
    // The lower two planes are added up as one integer; the third would not fit.
    static constexpr int kParts = kPlanes == 3 ? 2 : 1;
    Fixed x;
    std::vector<float> scales;     // [row][chunk][lane]
    std::vector<int32_t> offsets;  // [part][row][chunk][lane]: of a block in the first of its lanes
    std::vector<float> sums;       // [row][group], only for zero points

    Operand(const void* from, int dtype, int64_t rows, const Weight& weight)
        : x(fixed<kBits, kPlanes>(from, dtype, rows, weight.columns)),
          scales(size_t(rows * x.chunks * kLanes)),
          offsets(kParts * scales.size()),
          sums(size_t(weight.zero ? rows * weight.groups : 0)) {
        constexpr int64_t per_block = kBlock<kBits> * kBits / 32;
        for (int64_t i = 0; i < rows * x.blocks; i++) {
            int32_t parts[2] = {};  // the lower planes, the highest of three
            for (int64_t p = 0; p < kPlanes; p++) {
                int32_t& part = parts[kPlanes == 3 && p == 0];
                part = part * 256 + x.sums[size_t((i / x.blocks * kPlanes + p) * x.blocks + i % x.blocks)];
            }
            for (size_t part = 0; part < kParts; part++)
                offsets[part * scales.size() + size_t(i * per_block)] = -(1 << (kBits - 1)) * parts[part];
            for (int64_t lane = 0; lane < per_block; lane++) scales[size_t(i * per_block + lane)] = x.scales[size_t(i)];
        }
        for (int64_t row = 0; row < rows && weight.zero; row++)
            for (int64_t b = 0; b * kBlock<kBits> < weight.columns; b++) {
                const int64_t group = weight.groups == 1 ? 0 : b * kBlock<kBits> / weight.width;
                sums[size_t(row * weight.groups + group)] += x.wholes[size_t(row * x.blocks + b)];
            }
    }
};

// Rows of a weight, and their scales as they are needed: one for each chunk, or one for each lane of each chunk.
struct Panel {
    const uint32_t* packed;
    int64_t words;
    const float* scales;
    int64_t scales_per_row, scales_per_chunk;
};

// Where a chunk of x lies: its bytes, and what goes with its lanes.
struct Place {
    const int8_t* bytes;
    int64_t stride;
    const float* scales;
    const int32_t *offsets, *high_offsets;
};

// Adds one chunk of kTall rows of the weight times kMany rows of x to `total`.
template <int kBits, int kPlanes, int kTall, int kMany, bool kOneScale>
inline void add_chunk(const uint32_t* packed, int64_t stride, const Place (&places)[kMany], int64_t k,
                      const float* scales, int64_t scales_per_row, Lanes (&total)[kTall][kMany]) {
    constexpr int kHalves = kBits == 4 ? 2 : 1;
    Words codes[kTall][kHalves];
    Lanes scale[kTall];
    for (int n = 0; n < kTall; n++) {
        const Words words = kept(load_words(packed + n * stride));
        codes[n][0] = kBits == 4 ? words & 0x0f0f0f0f : words;
        if (kHalves == 2) codes[n][kHalves - 1] = words >> 4 & 0x0f0f0f0f;
        scale[n] = kOneScale ? lanes(scales[n * scales_per_row + k]) : load(scales + n * scales_per_row + k * kLanes);
    }
    for (int m = 0; m < kMany; m++) {
        const Place& x = places[m];
        const Lanes x_scale = load(x.scales + k * kLanes);
        Ints sums[kTall][kPlanes];
        for (int p = 0; p < kPlanes; p++) {
            const int8_t* bytes = x.bytes + p * x.stride + k * kChunk<kBits>;
            Ints start = {};
            if (p + 1 == kPlanes) start = Ints(load_words(x.offsets + k * kLanes));
            if (kPlanes == 3 && p == 0) start = Ints(load_words(x.high_offsets + k * kLanes));
            for (int n = 0; n < kTall; n++) sums[n][p] = start;
            for (int half = 0; half < kHalves; half++) {
                const Words four = kept(load_words(bytes + half * kLanes * 4));
                for (int n = 0; n < kTall; n++) sums[n][p] = dot4<kBits>(sums[n][p], codes[n][half], four);
            }
        }
        for (int n = 0; n < kTall; n++) {
            Ints low = sums[n][kPlanes - 1];
            if (kPlanes > 1) low += sums[n][kPlanes > 1 ? kPlanes - 2 : 0] << 8;
            Lanes sum = to_floats(low);
            if (kPlanes > 2) sum += to_floats(sums[n][0]) * 65536.0f;
            total[n][m] = multiply_add(sum * x_scale, scale[n], total[n][m]);
        }
    }
}

// kTall rows of the weight times kMany rows of x from `first` on.
template <int kBits, int kPlanes, int kTall, int kMany, bool kOneScale>
void product(const Panel& panel, const Operand<kBits, kPlanes>& in, int64_t first, float (&sums)[kTall][kMany]) {
    const int64_t words = panel.words, whole = words / kLanes, per_row = panel.scales_per_row;
    const uint32_t* packed = panel.packed;
    const float* scales = panel.scales;
    Place places[kMany];
    for (int m = 0; m < kMany; m++) {
        const int64_t lane = (first + m) * in.x.chunks * kLanes;
        places[m] = {in.x.plane(first + m, 0), in.x.stride, in.scales.data() + lane, in.offsets.data() + lane,
                     in.offsets.data() + (in.kParts - 1) * in.scales.size() + lane};
    }
    Lanes total[kTall][kMany] = {};
    for (int64_t k = 0; k < whole; k++, packed += kLanes) {
        // Rows are too short for the processor's own prefetching to get going: ask for those after the next, into the
        // second-level cache (asking for the first level is half as fast).
        for (int n = 0; n < kTall; n++) __builtin_prefetch(packed + (n + 2 * kTall) * words, 0, 2);
        add_chunk<kBits, kPlanes, kTall, kMany, kOneScale>(packed, words, places, k, scales, per_row, total);
    }
    if (whole < in.x.chunks) {  // the last one ends early; what is missing meets activations that are zero
        uint32_t rest[kTall][kLanes] = {};
        for (int n = 0; n < kTall; n++)
            std::memcpy(rest[n], packed + n * words, size_t(words - whole * kLanes) * sizeof(uint32_t));
        add_chunk<kBits, kPlanes, kTall, kMany, kOneScale>(rest[0], kLanes, places, whole, scales, per_row, total);
    }
    for (int n = 0; n < kTall; n++)
        for (int m = 0; m < kMany; m++) sums[n][m] = sum_of(total[n][m]);
}

// The workspace of a thread.
struct Scratch {
    std::vector<float> stored, scales;
};

template <int kBits, int kPlanes, int kTall, int kMany>
void add_rows(const Weight& weight, const Panel& panel, const Operand<kBits, kPlanes>& in, const Scratch& scratch,
              int64_t row, int64_t first, void* y, int dtype) {
    float sums[kTall][kMany];
    (panel.scales_per_chunk == 1 ? product<kBits, kPlanes, kTall, kMany, true>
                                 : product<kBits, kPlanes, kTall, kMany, false>)(panel, in, first, sums);
    for (int n = 0; n < kTall; n++) {
        const int8_t* zero = weight.zero ? weight.zero + (row + n) * weight.groups : nullptr;
        float bias = 0.0f;
        if (weight.bias) widen(weight.bias, weight.bias_dtype, row + n, 1, &bias);
        for (int m = 0; m < kMany; m++) {
            float offset = 0.0f;
            for (int64_t g = 0; zero && g < weight.groups; g++)
                offset += scratch.stored[size_t(n * weight.groups + g)] * float(zero[g]) *
                          in.sums[size_t((first + m) * weight.groups + g)];
            const float sum = sums[n][m] - offset + bias;
            narrow(&sum, 1, dtype, (first + m) * weight.rows + row + n, y);
        }
    }
}

// The scales of a row, one for each group, to one for each chunk or lane.
template <int kBits>
inline void spread(const float* stored, const Weight& weight, const Panel& panel, float* out) {
    if (weight.groups == 1) {
        for (int64_t i = 0; i < panel.scales_per_row; i++) out[i] = *stored;
        return;
    }
    if (panel.scales_per_chunk == 1) {
        const int64_t each = weight.width / kChunk<kBits>;
        for (int64_t g = 0; g < weight.groups; g++)
            for (int64_t i = 0; i < each; i++) *out++ = stored[g];
        return;
    }
    const int64_t each = weight.width * kBits / 32;  // lanes; 4 at least
    float* const end = out + panel.scales_per_row;
    for (int64_t g = 0; g < weight.groups; g++, out += each)
        for (int64_t i = 0; i < each; i += 4) {
            const float four[4] = {stored[g], stored[g], stored[g], stored[g]};
            std::memcpy(out + i, four, sizeof four);
        }
    while (out < end) *out++ = 0.0f;
}

// kTall rows of the weight, from `row` on, times all of x.
template <int kBits, int kPlanes, int kTall>
void rows_of(const Weight& weight, Panel panel, const Operand<kBits, kPlanes>& in, int64_t row, Scratch& scratch,
             void* y, int dtype) {
    widen(weight.scale, weight.scale_dtype, row * weight.groups, kTall * weight.groups, scratch.stored.data());
    panel.scales = scratch.stored.data();
    if (panel.scales_per_row != weight.groups) {
        for (int n = 0; n < kTall; n++)
            spread<kBits>(scratch.stored.data() + n * weight.groups, weight, panel,
                          scratch.scales.data() + n * panel.scales_per_row);
        panel.scales = scratch.scales.data();
    }
    panel.packed += row * weight.words;
    int64_t m = 0;
    for (; m + 4 <= in.x.rows; m += 4) add_rows<kBits, kPlanes, kTall, 4>(weight, panel, in, scratch, row, m, y, dtype);
    for (; m + 2 <= in.x.rows; m += 2) add_rows<kBits, kPlanes, kTall, 2>(weight, panel, in, scratch, row, m, y, dtype);
    for (; m < in.x.rows; m++) add_rows<kBits, kPlanes, kTall, 1>(weight, panel, in, scratch, row, m, y, dtype);
}

template <int kBits, int kPlanes>
void linear(const void* x, int dtype, int64_t x_rows, const Weight& weight, void* y) {
    constexpr int64_t tall = 4;
    const Operand<kBits, kPlanes> in(x, dtype, x_rows, weight);
    const int64_t per_chunk = weight.groups == 1 || weight.width % kChunk<kBits> == 0 ? 1 : kLanes;
    const Panel panel{weight.packed, weight.words, nullptr, in.x.chunks * per_chunk, per_chunk};
#pragma omp parallel
    {
        Scratch scratch{std::vector<float>(size_t(tall * weight.groups)),
                        std::vector<float>(size_t(tall * panel.scales_per_row))};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < weight.rows; row += tall) {
            if (row + tall <= weight.rows)
                rows_of<kBits, kPlanes, tall>(weight, panel, in, row, scratch, y, dtype);
            else
                for (int64_t n = row; n < weight.rows; n++)
                    rows_of<kBits, kPlanes, 1>(weight, panel, in, n, scratch, y, dtype);
        }
    }
}

}  // namespace

// planes: see fixed.h; one is computed as two, as memory is what is waited for. `y` has the dtype of `x`.
extern "C" void glmquant_linear(const void* x, int dtype, int64_t x_rows, int64_t columns, const uint32_t* packed,
                                int64_t rows, int64_t words, int bits, const void* scale, int scale_dtype,
                                int64_t groups, const int8_t* zero, const void* bias, int bias_dtype, int planes,
                                void* y) {
    const Weight weight{packed, rows, words, columns, groups, columns / groups, scale, scale_dtype, zero, bias, bias_dtype};
    if (bits == 4)
        (planes == 3 ? linear<4, 3> : linear<4, 2>)(x, dtype, x_rows, weight, y);
    else
        (planes == 3 ? linear<8, 3> : linear<8, 2>)(x, dtype, x_rows, weight, y);
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
            narrow(values.data(), columns, dtype, n * columns, out);
        }
    }
}
