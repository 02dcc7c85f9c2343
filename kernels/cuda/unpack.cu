// Packed codes to weights and back, and how far off they are; the layouts are drawn in common.cuh.
//
//     packed   codes of [rows, columns] in a layout       codes   int8 [rows, columns], signed
//     scale    half, bfloat16 or float32 [rows, columns / width]
//     zero     int8 [rows, columns / width] or null
//
// glmquant_pack, glmquant_unpack   one thread per eight columns
// glmquant_dequantize              the same, to half, bfloat16 or float32: (code - zero) * scale, rounded once
// glmquant_errors                  one thread per 128 columns: its sums of (w' - w)**2 and w**2

#include "common.cuh"

extern "C" __global__ void glmquant_pack(const signed char* codes, i64 rows, i64 columns, int bits, int layout,
                                         void* packed) {
    const Eight mine = my_eight(rows, columns);
    if (!mine.count) return;
    int eight[8];
    get8(codes, kCodes, place(kCodes, 8, columns, mine), eight);
    put8(packed, layout, place(layout, bits, columns, mine), mine.count, eight);
}

extern "C" __global__ void glmquant_unpack(const void* packed, i64 rows, i64 columns, int bits, int layout,
                                           signed char* codes) {
    const Eight mine = my_eight(rows, columns);
    if (!mine.count) return;
    int eight[8];
    get8(packed, layout, place(layout, bits, columns, mine), eight);
    put8(codes, kCodes, place(kCodes, 8, columns, mine), mine.count, eight);
}

extern "C" __global__ void glmquant_dequantize(const void* packed, i64 rows, i64 columns, i64 groups, i64 width,
                                               int bits, int layout, const void* scale, int scale_dtype,
                                               const signed char* zero, void* out, int dtype) {
    const Eight mine = my_eight(rows, columns);
    if (!mine.count) return;
    int eight[8];
    get8(packed, layout, place(layout, bits, columns, mine), eight);
    float weights[8];
    for (int i = 0; i < 8; i++) {
        // Groups need not be multiples of eight here: neighbours may have different scales.
        const i64 column = mine.at + (i < mine.count ? i : 0);
        const Step step = step_of(scale, scale_dtype, zero, groups, width, mine.row, column);
        weights[i] = float(eight[i] - step.zero) * step.scale;
    }
    store8(out, dtype, mine.row * columns + mine.at, mine.count, weights);
}

// Squares in float32, their sums in float64, as kernels/cpu/quantize.cpp does: no order shows in what is reported.
extern "C" __global__ void glmquant_errors(const void* weight, int dtype, i64 rows, i64 columns, i64 groups,
                                           i64 width, const signed char* codes, const void* scale, int scale_dtype,
                                           const signed char* zero, double* sums) {
    const u32 per_row = u32((columns + 127) / 128), index = thread_index(), row = index / per_row;
    if (row >= rows) return;
    const i64 start = i64(index - row * per_row) * 128;
    const i64 stop = columns - start < 128 ? columns : start + 128;
    double error = 0.0, norm = 0.0;
    for (i64 at = start; at < stop; at += 8) {
        const int count = stop - at < 8 ? int(stop - at) : 8;
        float weights[8];
        int eight[8];
        load8(weight, dtype, row * columns + at, count, weights);
        get8(codes, kCodes, place(kCodes, 8, columns, {row, at, count}), eight);
        const Step step = step_of(scale, scale_dtype, zero, groups, width, row, at);
        for (int i = 0; i < 8; i++) {
            if (i >= count) break;
            const float off = float(eight[i] - step.zero) * step.scale - weights[i];
            error += off * off;
            norm += weights[i] * weights[i];
        }
    }
    sums[2 * i64(index)] = error;
    sums[2 * i64(index) + 1] = norm;
}
