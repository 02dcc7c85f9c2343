// Quantizing on a GPU: the bytes of glmquant/quantizers (torch) and kernels/cpu/quantize.cpp (a CPU), two kernels.
//
//     weight   half, bfloat16 or float32 [rows, columns], rows one after the other
//     scale    half, bfloat16 or float32 [rows, columns / width]; a group of `width` columns, or a row, shares one
//     zero     int8 [rows, columns / width], only when asymmetric
//     packed   the codes in one of the layouts that common.cuh draws
//
// glmquant_scales    one thread per group: extremes, or the least-squares search, then the scale as it is stored
// glmquant_encode    one thread per eight columns: divide by the stored scale, round, pack
//
// The search adds integers (see glmquant/quantizers/mse.py), so its result depends on no order.

#include "common.cuh"

enum Method { kNearest = 0, kLeastSquares = 1, kThudm = 2 };

// What `status` becomes if anything is wrong: then nothing that was written counts, and torch says what it is.
enum Status { kNotFinite = 1, kScaleOverflows = 2 };

__device__ inline float clamped(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// What to divide by so that a scale of 0 gives codes 0.
__device__ inline float divisor(float scale) { return scale == 0.0f ? float_of(kInfinity) : scale; }

struct Group {
    const void* weight;
    int dtype;
    i64 start, width;
};

struct Extremes {
    float low, high;  // zero lies between
    u32 largest;      // magnitude as bits, which are ordered as the numbers are: infinity and then NaN come last
};

__device__ inline Extremes extremes_of(const Group& group) {
    Extremes found = {0.0f, 0.0f, 0};
    for (i64 i = 0; i < group.width; i += 8) {
        float weight[8];
        load8(group.weight, group.dtype, group.start + i, group.width - i < 8 ? int(group.width - i) : 8, weight);
        for (int j = 0; j < 8; j++) {
            found.low = weight[j] < found.low ? weight[j] : found.low;
            found.high = weight[j] > found.high ? weight[j] : found.high;
            const u32 bits = bits_of(weight[j]) & ~kSign;
            found.largest = bits > found.largest ? bits : found.largest;
        }
    }
    return found;
}

struct Search {
    const float* inverses;  // candidates: codes are values * inverse
    int count;              // of all candidates
    int first;              // so many are tried for every group, the others while the last one was the best
    float units;            // the extreme of a group as an integer value, a power of two
};

// Best scale in units of the values and its quality so far, and the candidate it came from.
struct Best {
    double quality, scale;
    int winner;
};

// Weights whose products with codes an int32 surely adds up: 256 * 2**14 * 255 < 2**31.
constexpr i64 kChunk = 256;

// Tries kMany candidates from `start` in one pass over the group. Values are the weights in units: small integers.
template <int kMany>
__device__ inline void judge(const Group& group, float by, int below, int above, const Search& search, int start,
                             Best& best) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2**23: adding it rounds half to even, into the lowest bits
    float inverse[kMany];
    i64 crosses[kMany], squares[kMany];
    for (int k = 0; k < kMany; k++) inverse[k] = search.inverses[start + k], crosses[k] = squares[k] = 0;
    for (i64 chunk = 0; chunk < group.width; chunk += kChunk) {
        const i64 stop = group.width - chunk < kChunk ? group.width : chunk + kChunk;
        int cross[kMany], square[kMany];
        for (int k = 0; k < kMany; k++) cross[k] = square[k] = 0;
        for (i64 i = chunk; i < stop; i += 8) {
            float weight[8];
            load8(group.weight, group.dtype, group.start + i, stop - i < 8 ? int(stop - i) : 8, weight);
            for (int j = 0; j < 8; j++) {
                const float value = rintf(weight[j] * by);
                const int whole = int(value);
                for (int k = 0; k < kMany; k++) {
                    int code = int(bits_of(value * inverse[k] + shift) - bits_of(shift));
                    code = code < below ? below : code;
                    code = code > above ? above : code;
                    cross[k] += code * whole;
                    square[k] += code * code;
                }
            }
        }
        for (int k = 0; k < kMany; k++) crosses[k] += cross[k], squares[k] += square[k];
    }
    for (int k = 0; k < kMany; k++) {
        const double cross = double(crosses[k]), scale = cross / double(squares[k]), quality = cross * scale;
        if (quality > best.quality) best = {quality, scale, start + k};
    }
}

// The best scale in units of `unit`; 0 for a group of zeros.
__device__ inline double best_scale(const Group& group, float unit, int below, int above, const Search& search) {
    const float by = 1.0f / unit;
    Best best = {-1.0, 0.0, 0};
    int next = 0, stop = search.first;
    do {
        for (; next + 4 <= stop; next += 4) judge<4>(group, by, below, above, search, next, best);
        for (; next < stop; next++) judge<1>(group, by, below, above, search, next, best);
        // On by fours, as long as the last of them is the best yet.
        stop = next + 4 < search.count ? next + 4 : search.count;
    } while (best.winner == next - 1 && next < search.count);
    return best.scale;
}

// What values count in; never so small that it has no inverse.
__device__ inline float unit_of(float range, const Search& search) {
    const float smallest = float_of(0x00800000u), unit = range / search.units;
    return unit < smallest ? smallest : unit;
}

// Stores a scale; returns the value that a reader will see.
__device__ inline float stored(void* scale, int dtype, i64 at, float value) {
    store(scale, dtype, at, value);
    return load(scale, dtype, at);
}

extern "C" __global__ void glmquant_scales(const void* weight, int dtype, i64 groups, i64 width, int bits,
                                           int symmetric, int method, const float* inverses, int count, int first,
                                           float units, void* scale, int scale_dtype, signed char* zero,
                                           int* status) {
    const i64 at = thread_index();
    if (at >= groups) return;
    const int qmin = -(1 << (bits - 1)), qmax = -qmin - 1;
    const Group group = {weight, dtype, at * width, width};
    const Search search = {inverses, count, first, units};
    const Extremes found = extremes_of(group);
    if (found.largest >= kInfinity) {
        *status = kNotFinite;  // whoever else writes it writes something that is not 0 either
        return;
    }
    // What the extremes alone say; for the search, the unit of its values and the range of its codes.
    float seen, unit;
    int offset = 0;
    if (symmetric) {
        const float largest = float_of(found.largest);
        seen = stored(scale, scale_dtype, at, largest / float(qmax));
        // The sign of the unit turns the extreme to the side of qmin.
        unit = unit_of(largest, search);
        if (found.high == largest) unit = -unit;
    } else {
        const float range = found.high - found.low;
        seen = stored(scale, scale_dtype, at, range / float(qmax - qmin));
        const float point = clamped(rintf(float(qmin) - found.low / divisor(seen)), float(qmin), float(qmax));
        zero[at] = static_cast<signed char>(int(point));
        offset = int(point);
        unit = unit_of(range, search);
    }
    // Without a zero point that a reader could use there is nothing to search for.
    if (method == kLeastSquares && (symmetric || is_finite(seen))) {
        const double best = best_scale(group, unit, qmin - offset, qmax - offset, search);
        seen = stored(scale, scale_dtype, at, float(best) * unit + 0.0f);
    }
    if (!is_finite(seen)) *status = kScaleOverflows;
}

// THUDM divides in half precision. Quotients that are no normal halves end as 0 or clamped either way, so that
// rounding the significand to 11 bits is enough.
__device__ inline float rounded_like_half(float quotient) {
    const u32 bits = bits_of(quotient);
    return float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

extern "C" __global__ void glmquant_encode(const void* weight, int dtype, i64 rows, i64 columns, i64 groups,
                                           i64 width, int bits, int method, const void* scale, int scale_dtype,
                                           const signed char* zero, int layout, void* packed) {
    const Eight mine = my_eight(rows, columns);
    if (!mine.count) return;
    const float qmin = float(-(1 << (bits - 1))), qmax = -qmin - 1.0f;
    // Groups are multiples of eight columns, or rows: one scale for all.
    const Step step = step_of(scale, scale_dtype, zero, groups, width, mine.row, mine.at);
    const float by = divisor(step.scale), point = float(step.zero);
    float weights[8];
    load8(weight, dtype, mine.row * columns + mine.at, mine.count, weights);
    int codes[8];
    for (int i = 0; i < 8; i++) {
        float quotient = weights[i] / by;
        if (method == kThudm) quotient = rounded_like_half(quotient);
        codes[i] = int(clamped(rintf(quotient) + point, qmin, qmax));
    }
    put8(packed, layout, place(layout, bits, columns, mine), mine.count, codes);
}
