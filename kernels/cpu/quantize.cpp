// Quantizing on a CPU: what glmquant/quantizers does with torch, in one pass that never leaves the first-level cache.
//
// One group of columns (or one row) at a time: widen to float32, find the extremes, choose the scale, write the
// codes. torch needs a dozen passes over a block for the same; here a weight is read once from memory, and a
// candidate scale of the least-squares search costs half a cycle.
//
//     weight   half, bfloat16 or float32 [rows, columns], rows one after the other
//     codes    int8 [rows, columns], signed
//     scale    half, bfloat16 or float32 [rows, columns / width]
//     zero     int8 [rows, columns / width], only when asymmetric
//
// The codes and scales are those of the torch code, bit for bit; the tests hold the two against each other. So
// every rounding below is a decision made there. Compile without contraction of a*b+c and without -ffast-math.
// Loops are written for a compiler's vectorizer (gcc and clang do well); sums are reordered only where they are
// exact, see glmquant/quantizers/mse.py.

#include <cmath>
#include <vector>

#include "common.h"

namespace {

enum Method { kNearest = 0, kLeastSquares = 1, kThudm = 2 };

// Anything but kDone means: nothing that was written counts, and the torch code will say what is wrong.
enum Status { kDone = 0, kNotFinite = 1, kScaleOverflows = 2 };

// Writes the scale as it is stored; returns the value that a reader will see.
float store(void* scale, int dtype, int64_t at, float value) {
    if (dtype == kFloat) return static_cast<float*>(scale)[at] = value;
    uint16_t stored = dtype == kHalf ? to_half(value) : to_bfloat16(value);
    static_cast<uint16_t*>(scale)[at] = stored;
    return dtype == kHalf ? from_half(stored) : float_of(uint32_t(stored) << 16);
}

// ---- Pieces of arithmetic; the names are those of glmquant/quantizers/grid.py.

float clamped(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// What to divide by so that a scale of 0 gives codes 0.
float divisor(float scale) { return scale == 0.0f ? INFINITY : scale; }

// The largest magnitude as bits, which are ordered as the numbers are: infinity and then NaN come last.
uint32_t largest_magnitude(const float* weight, int64_t width) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = bits_of(weight[i]) & ~kSign;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

void extremes(const float* weight, int64_t width, float* low, float* high) {
    float least = 0.0f, most = 0.0f;  // zero is always on the grid
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < width; i++) {
        least = weight[i] < least ? weight[i] : least;
        most = weight[i] > most ? weight[i] : most;
    }
    *low = least;
    *high = most;
}

struct Grid {
    float qmin, qmax;
    bool symmetric;
};

void round_to_codes(const float* weight, int64_t width, float scale, float zero, const Grid& grid, int8_t* codes) {
    float by = divisor(scale);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
        codes[i] = int8_t(int32_t(clamped(__builtin_rintf(weight[i] / by) + zero, grid.qmin, grid.qmax)));
}

// THUDM divides in half precision. Quotients that are no normal halves end as 0 or clamped either way, so that
// rounding the significand to 11 bits is enough.
void round_to_codes_thudm(const float* weight, int64_t width, float scale, const Grid& grid, int8_t* codes) {
    float by = divisor(scale);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = bits_of(weight[i] / by);
        float half = float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
        codes[i] = int8_t(int32_t(clamped(__builtin_rintf(half), grid.qmin, grid.qmax)));
    }
}

// ---- The least-squares search. Everything hangs on its inner loop, so that one is written in vectors, and tries as
// many candidates at once as registers can hold.

constexpr int kAtOnce = kLanes == 16 ? 8 : 4;

// Terms are integers below 2**24.
double sum(Lanes terms) {
    float term[kLanes];
    std::memcpy(term, &terms, sizeof terms);
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < kLanes; i++) total += int32_t(term[i]);
    return total;
}

struct Search {
    const float* inverses;  // candidates: codes are values * inverse
    int64_t count;          // of all candidates
    int64_t first;          // so many are tried for every group, the others while the last one was the best
    int64_t terms;          // float32 sums of so many products are exact
    float units;            // the extreme of a group in `values`, a power of two
};

// Best scale and quality so far, and the candidate they came from.
struct Best {
    double quality = -1.0, scale = 0.0;
    int64_t winner = 0;
};

// Tries kMany candidates from `start` at once, which hides the latency of each. `width` is a multiple of kLanes.
template <int kMany>
void judge(const float* values, int64_t width, float below, float above, const Search& search, int64_t start,
           Best& best) {
    const Lanes low = lanes(below), high = lanes(above);
    const Lanes shift = lanes(0x1.8p23f);  // adding and subtracting it rounds half to even
    double cross[kMany] = {}, square[kMany] = {};
    // Each lane sums by itself, so a chunk may have as many terms in every lane.
    for (int64_t chunk = 0; chunk < width; chunk += search.terms * kLanes) {
        int64_t stop = chunk + search.terms * kLanes < width ? chunk + search.terms * kLanes : width;
        Lanes crosses[kMany] = {}, squares[kMany] = {};
        for (int64_t i = chunk; i < stop; i += kLanes) {
            Lanes value = load(values + i);
            for (int k = 0; k < kMany; k++) {
                Lanes code = (value * search.inverses[start + k] + shift) - shift;
                code = code < low ? low : code;
                code = code > high ? high : code;
                // small integers: nothing to round, with or without an instruction for both
                crosses[k] = multiply_add(code, value, crosses[k]);
                squares[k] = multiply_add(code, code, squares[k]);
            }
        }
        for (int k = 0; k < kMany; k++) cross[k] += sum(crosses[k]), square[k] += sum(squares[k]);
    }
    for (int k = 0; k < kMany; k++) {
        double scale = cross[k] / square[k], quality = cross[k] * scale;
        if (quality > best.quality) best = {quality, scale, start + k};
    }
}

void judge_up_to(const float* values, int64_t width, float below, float above, const Search& search, int64_t start,
                 int64_t stop, Best& best) {
    for (; start + kAtOnce <= stop; start += kAtOnce)
        judge<kAtOnce>(values, width, below, above, search, start, best);
    for (; start + 4 <= stop; start += 4) judge<4>(values, width, below, above, search, start, best);
    for (; start < stop; start++) judge<1>(values, width, below, above, search, start, best);
}

// The best scale in units of `values`; 0 for a group of zeros.
double best_scale(const float* values, int64_t width, float below, float above, const Search& search) {
    Best best;
    judge_up_to(values, width, below, above, search, 0, search.first, best);
    // On by fours, as long as the last of them is the best yet.
    int64_t last = search.first;
    while (best.winner == last - 1 && last < search.count) {
        int64_t stop = last + 4 < search.count ? last + 4 : search.count;
        judge_up_to(values, width, below, above, search, last, stop, best);
        last = stop;
    }
    return best.scale;
}

// What `values` count in; never so small that it has no inverse.
float unit_of(float range, const Search& search) {
    float unit = range / search.units;
    return unit < 0x1p-126f ? 0x1p-126f : unit;
}

// Integers, filled up with zeros to a multiple of kLanes: a zero adds nothing to any sum.
int64_t to_values(const float* weight, int64_t width, float unit, float* values) {
    float by = 1.0f / unit;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) values[i] = __builtin_rintf(weight[i] * by);
    int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = width; i < padded; i++) values[i] = 0.0f;
    return padded;
}

// ---- One group: its scale before it is stored.

float symmetric_scale(const float* weight, int64_t width, int method, const Grid& grid, const Search& search,
                      float largest, float* values) {
    if (method != kLeastSquares) return largest / grid.qmax;
    float low, high;
    extremes(weight, width, &low, &high);
    // The sign of the unit turns the extreme to the side of qmin.
    float size = unit_of(largest, search);
    float unit = high == largest ? -size : size;
    int64_t padded = to_values(weight, width, unit, values);
    return float(best_scale(values, padded, grid.qmin, grid.qmax, search)) * unit + 0.0f;
}

}  // namespace

extern "C" int glmquant_quantize(const void* weight, int dtype, int64_t rows, int64_t columns, int64_t width,
                                 int bits, int symmetric, int method, const float* inverses, int64_t count,
                                 int64_t first, int64_t terms, float units, int scale_dtype, int8_t* codes,
                                 void* scale, int8_t* zero) {
    const Grid grid{float(-(1 << (bits - 1))), float((1 << (bits - 1)) - 1), symmetric != 0};
    const Search search{inverses, count, first, terms, units};
    std::vector<float> wide(size_t(width + kLanes) * 2);
    float* group = wide.data();
    float* values = group + width + kLanes;
    const float levels = grid.qmax - grid.qmin;
    for (int64_t at = 0; at < rows * columns / width; at++) {
        int8_t* out = codes + at * width;
        widen(weight, dtype, at * width, width, group);
        uint32_t magnitude = largest_magnitude(group, width);
        if (magnitude >= kInfinity) return kNotFinite;
        float stored, chosen, zero_point = 0.0f;
        if (grid.symmetric) {
            chosen = symmetric_scale(group, width, method, grid, search, float_of(magnitude), values);
            stored = store(scale, scale_dtype, at, chosen);
        } else {
            float low, high;
            extremes(group, width, &low, &high);
            stored = store(scale, scale_dtype, at, (high - low) / levels);
            zero_point = clamped(__builtin_rintf(grid.qmin - low / divisor(stored)), grid.qmin, grid.qmax);
            zero[at] = int8_t(int32_t(zero_point));
            if (method == kLeastSquares) {
                if (!std::isfinite(stored)) return kScaleOverflows;
                float unit = unit_of(high - low, search);
                int64_t padded = to_values(group, width, unit, values);
                chosen = float(best_scale(values, padded, grid.qmin - zero_point, grid.qmax - zero_point, search));
                stored = store(scale, scale_dtype, at, chosen * unit);
            }
        }
        if (!std::isfinite(stored)) return kScaleOverflows;
        if (method == kThudm)
            round_to_codes_thudm(group, width, stored, grid, out);
        else
            round_to_codes(group, width, stored, zero_point, grid, out);
    }
    return kDone;
}

// Adds ||w - w'||**2 and ||w||**2 to sums[0] and sums[1]: squares in float32, their sums in float64. So what the order
// of summation changes lies far below the digits that a report shows, and every device reports the same.
extern "C" void glmquant_errors(const void* weight, int dtype, int64_t rows, int64_t columns, int64_t width,
                                const int8_t* codes, const void* scale, int scale_dtype, const int8_t* zero,
                                double* sums) {
    constexpr int64_t kMost = 128, kSums = 16;
    float wide[kMost], off[kMost];
    double error[kSums] = {}, norm[kSums] = {};
    for (int64_t at = 0; at < rows * columns / width; at++) {
        float step;
        widen(scale, scale_dtype, at, 1, &step);
        float zero_point = zero ? float(zero[at]) : 0.0f;
        for (int64_t start = at * width; start < (at + 1) * width; start += kMost) {
            int64_t count = (at + 1) * width - start < kMost ? (at + 1) * width - start : kMost;
            widen(weight, dtype, start, count, wide);
#pragma omp simd
            for (int64_t i = 0; i < count; i++)
                off[i] = (float(codes[start + i]) - zero_point) * step - wide[i];
            int64_t filled = (count + kSums - 1) / kSums * kSums;
            for (int64_t i = count; i < filled; i++) off[i] = wide[i] = 0.0f;
            for (int64_t i = 0; i < filled; i += kSums) {
#pragma omp simd
                for (int64_t j = 0; j < kSums; j++) {
                    error[j] += double(off[i + j] * off[i + j]);
                    norm[j] += double(wide[i + j] * wide[i + j]);
                }
            }
        }
    }
    for (int64_t j = 0; j < kSums; j++) sums[0] += error[j], sums[1] += norm[j];
}

// ---- Two 4-bit codes to a byte; see glmquant/packing.py for the layouts. A pair of int8 codes is one 16-bit word
// whose low byte is the even column.

extern "C" void glmquant_pack_low_first(const int8_t* codes, int64_t bytes, uint8_t* packed) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(codes);
    for (int64_t i = 0; i < bytes; i++) {
        uint16_t pair = (pairs[i] & 0x0f0f) ^ 0x0808;  // each code + 8
        packed[i] = uint8_t(pair | pair >> 4);
    }
}

extern "C" void glmquant_unpack_low_first(const uint8_t* packed, int64_t bytes, int8_t* codes) {
    for (int64_t i = 0; i < bytes; i++) {
        codes[2 * i] = int8_t((packed[i] & 15) - 8);
        codes[2 * i + 1] = int8_t((packed[i] >> 4) - 8);
    }
}

extern "C" void glmquant_pack_high_first(const int8_t* codes, int64_t bytes, uint8_t* packed) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(codes);
    for (int64_t i = 0; i < bytes; i++) packed[i] = uint8_t(pairs[i] << 4 | (pairs[i] >> 8 & 15));
}

extern "C" void glmquant_unpack_high_first(const uint8_t* packed, int64_t bytes, int8_t* codes) {
    for (int64_t i = 0; i < bytes; i++) {
        codes[2 * i] = int8_t(int8_t(packed[i]) >> 4);
        codes[2 * i + 1] = int8_t(int8_t(packed[i] << 4) >> 4);
    }
}
