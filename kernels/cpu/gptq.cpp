// GPTQ's inner loop, glmquant/quantizers/gptq.py: the columns of one group are rounded one after the other, and what
// each leaves of an error is added to what is wanted of the columns behind it, once for every candidate of a scale.
//
// torch needs a dozen passes over memory for each column; here kLanes rows go through all columns in the first-level
// cache. Products and sums are rounded one by one and in the order of torch's code, so the bytes are the same. Compile
// without contraction of a*b+c.
//
//     base, target       float32 [columns, rows]: the weights, and what is wanted after the groups before
//     factor             float32 [columns, columns]: what the error of column i adds to column j, at [i, j]
//     gains              float32 [columns]: what a squared error counts
//     scale, inverse     float32 [candidates, rows]; the inverse of a scale that has none is 0
//     zero               float32 [candidates, rows]
//     codes, errors      float32 [columns, rows], of the candidate with the least loss
//     loss, chosen       [rows], that loss and which it is; of equals the first

#include <vector>

#include "common.h"

namespace {

Lanes some(const float* from, size_t bytes) {
    Lanes loaded{};
    std::memcpy(&loaded, from, bytes);
    return loaded;
}

struct Group {
    const float *base, *target, *factor, *gains;
    int64_t columns, rows;
    float qmin, qmax;
};

// Rounds the rows `row`.. to one candidate; returns their losses. `wanted` is scratch.
Lanes round_to(const Group& group, int64_t row, size_t bytes, Lanes scale, Lanes inverse, Lanes zero, Lanes* wanted,
               Lanes* codes, Lanes* errors) {
    const Lanes shift = lanes(0x1.8p23f);  // adding and subtracting it rounds half to even
    const Lanes low = group.qmin - zero, high = group.qmax - zero;
    for (int64_t i = 0; i < group.columns; i++) wanted[i] = some(group.target + i * group.rows + row, bytes);
    Lanes loss{};
    for (int64_t i = 0; i < group.columns; i++) {
        Lanes code = wanted[i] * inverse;
        code = code < low ? low : code;
        code = code > high ? high : code;
        code = (code + shift) - shift;
        const Lanes value = code * scale, off = value - wanted[i];
        const Lanes error = some(group.base + i * group.rows + row, bytes) - value;
        loss += off * off * group.gains[i];
        codes[i] = code + zero;
        errors[i] = error;
        const float* factor = group.factor + i * group.columns;
        for (int64_t j = i + 1; j < group.columns; j++) wanted[j] += error * factor[j];
    }
    return loss;
}

}  // namespace

extern "C" void glmquant_gptq(const float* base, const float* target, const float* factor, const float* gains,
                              int64_t columns, int64_t rows, const float* scale, const float* inverse,
                              const float* zero, int64_t candidates, float qmin, float qmax, float* codes,
                              float* errors, float* loss, int64_t* chosen) {
    const Group group{base, target, factor, gains, columns, rows, qmin, qmax};
#pragma omp parallel
    {
        // kLanes rows of: what is wanted; codes and errors of a candidate; those of the best one.
        std::vector<Lanes> scratch(size_t(5 * columns));
        Lanes *wanted = scratch.data(), *code = wanted + columns, *error = code + columns;
        Lanes *best_code = error + columns, *best_error = best_code + columns;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += kLanes) {
            const int64_t count = row + kLanes < rows ? kLanes : rows - row;
            const size_t bytes = size_t(count) * sizeof(float);
            Lanes least{};
            for (int64_t k = 0; k < candidates; k++) {
                const int64_t at = k * rows + row;
                Lanes found = round_to(group, row, bytes, some(scale + at, bytes), some(inverse + at, bytes),
                                       some(zero + at, bytes), wanted, code, error);
                const auto better = k == 0 ? found == found : found < least;
                least = better ? found : least;
                for (int64_t i = 0; i < columns; i++) {
                    best_code[i] = better ? code[i] : best_code[i];
                    best_error[i] = better ? error[i] : best_error[i];
                }
                for (int64_t lane = 0; lane < count; lane++)
                    if (better[lane]) chosen[row + lane] = k;
            }
            for (int64_t i = 0; i < columns; i++) {
                std::memcpy(codes + i * rows + row, best_code + i, bytes);
                std::memcpy(errors + i * rows + row, best_error + i, bytes);
            }
            std::memcpy(loss + row, &least, bytes);
        }
    }
}
