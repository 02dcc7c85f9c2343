// What a decoded token needs between the products with weights: norm, positions, attention to a cache, activation.
//
// There is little to compute, and torch takes several operations for each, every one with a price of its own. Results
// are rounded to the dtype of the model where torch's operations round them.
//
//     keys, values   [slots, groups, capacity, width], of the dtype of the model; a sequence is in one of the slots
//
// Attention goes through a sequence in pieces of a fixed number of columns, whose results are merged in order, so that
// they do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t kTile = 64;    // columns whose scores are computed before their values are added
constexpr int64_t kPiece = 256;  // columns of a task
constexpr int64_t kLeast = 4096;  // numbers for which a second thread is worth being woken

// As if they had been kept in a dtype.
void round_to(int dtype, float* values, int64_t count) {
    if (dtype == kFloat) return;
    uint16_t stored[256];
    for (int64_t i = 0; i < count; i += 256) {
        const int64_t n = std::min<int64_t>(256, count - i);
        narrow(values + i, n, dtype, 0, stored);
        widen(stored, dtype, 0, n, values + i);
    }
}

// exp, to 2 units in the last place; 0 below -87.3, infinity above 88.7, and NaN stays NaN. Cody and Waite's reduction, and the series to the seventh power
// on |r| <= ln(2)/2, whose rest is below 2^-25.
inline Lanes exponential(const Lanes given) {
    const Lanes least = lanes(-87.3f), most = lanes(88.7f), magic = lanes(0x1.8p23f);
    Lanes x = given < most ? given : most;
    x = x > least ? x : least;
    const Lanes shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Lanes r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Lanes sum = lanes(1.0f / 5040);
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + term;
    typedef int32_t Ints __attribute__((vector_size(sizeof(Lanes))));
    // The exponent goes in by halves: 2^128 is no float32.
    const Ints whole = Ints(shifted) - 0x4b400000, half = whole >> 1;
    sum = sum * Lanes((half + 127) << 23) * Lanes((whole - half + 127) << 23);
    sum = given < least ? lanes(0.0f) : given > most ? lanes(INFINITY) : sum;
    return given == given ? sum : given;
}

void exponential(float* values, int64_t count, float shift) {
    int64_t i = 0;
    for (; i < count; i += kLanes) {
        float part[kLanes] = {};
        const size_t size = size_t(std::min<int64_t>(kLanes, count - i)) * sizeof(float);
        std::memcpy(part, values + i, size);
        const Lanes found = exponential(load(part) - lanes(shift));
        std::memcpy(values + i, &found, size);
    }
}

float dot(const float* a, const float* b, int64_t count) {
    Lanes total[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
        for (int n = 0; n < 2; n++)
            total[n] = multiply_add(load(a + i + n * kLanes), load(b + i + n * kLanes), total[n]);
    float sum = sum_of(total[0] + total[1]);
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

// sums += factor * values
void add_to(float* sums, float factor, const float* values, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Lanes sum = multiply_add(lanes(factor), load(values + i), load(sums + i));
        std::memcpy(sums + i, &sum, sizeof sum);
    }
    for (; i < count; i++) sums[i] += factor * values[i];
}

// The softmax of a piece: what its values add up to, relative to its largest score, and the weights' sum.
struct Part {
    float largest, total;
};

// The queries of a group, and the columns from `begin` to `end` of its keys and values.
struct Group {
    const float* queries;  // [heads][width], with the scale
    int64_t heads, width;
    const void *keys, *values;  // [columns][width]
    int dtype;
};

void attend_to(const Group& group, int64_t begin, int64_t end, Part* parts, float* sums) {
    const int64_t heads = group.heads, width = group.width;
    std::vector<float> rows(size_t(kTile * width)), scores(size_t(heads * kTile));
    std::fill(sums, sums + heads * width, 0.0f);
    for (int64_t h = 0; h < heads; h++) parts[h] = {-INFINITY, 0.0f};
    for (int64_t tile = begin; tile < end; tile += kTile) {
        const int64_t count = std::min(kTile, end - tile);
        widen(group.keys, group.dtype, tile * width, count * width, rows.data());
        for (int64_t c = 0; c < count; c++)
            for (int64_t h = 0; h < heads; h++)
                scores[size_t(h * kTile + c)] = dot(group.queries + h * width, rows.data() + c * width, width);
        widen(group.values, group.dtype, tile * width, count * width, rows.data());
        for (int64_t h = 0; h < heads; h++) {
            float* score = scores.data() + h * kTile;
            Part& part = parts[h];
            const float largest = std::max(part.largest, *std::max_element(score, score + count));
            const float before = std::exp(part.largest - largest);
            float* sum = sums + h * width;
            if (before != 1.0f)
                for (int64_t d = 0; d < width; d++) sum[d] *= before;
            exponential(score, count, largest);
            part = {largest, part.total * before};
            for (int64_t c = 0; c < count; c++) part.total += score[c], add_to(sum, score[c], rows.data() + c * width, width);
        }
    }
}

}  // namespace

// out = norm(x + delta) * weight, all [rows, columns] of `dtype`; x becomes the sum. `delta` may be null.
extern "C" void glmquant_rms_norm(void* x, const void* delta, const void* weight, int dtype, int64_t rows,
                                  int64_t columns, float epsilon, void* out) {
    const size_t size = size_t(columns);
    std::vector<float> sum(size), other(size);
    for (int64_t row = 0; row < rows; row++) {
        widen(x, dtype, row * columns, columns, sum.data());
        if (delta) {
            widen(delta, dtype, row * columns, columns, other.data());
            for (size_t c = 0; c < size; c++) sum[c] += other[c];
            round_to(dtype, sum.data(), columns);
            narrow(sum.data(), columns, dtype, row * columns, x);
        }
        const float factor = 1.0f / std::sqrt(dot(sum.data(), sum.data(), columns) / float(columns) + epsilon);
        widen(weight, dtype, 0, columns, other.data());
        for (size_t c = 0; c < size; c++) sum[c] *= factor;
        round_to(dtype, sum.data(), columns);
        for (size_t c = 0; c < size; c++) sum[c] *= other[c];
        narrow(sum.data(), columns, dtype, row * columns, out);
    }
}

// [rows, 2n] -> silu(first half) * second half, [rows, n].
extern "C" void glmquant_silu_product(const void* both, int dtype, int64_t rows, int64_t n, void* out) {
    constexpr int64_t step = 256;
    const int64_t steps = (n + step - 1) / step;
#pragma omp parallel for schedule(static) if (rows * n > kLeast)
    for (int64_t i = 0; i < rows * steps; i++) {
        const int64_t row = i / steps, start = i % steps * step, count = std::min(step, n - start);
        float gate[step] = {}, up[step];
        widen(both, dtype, 2 * row * n + start, count, gate);
        widen(both, dtype, 2 * row * n + n + start, count, up);
        for (int64_t c = 0; c < count; c += kLanes) {
            const Lanes value = load(gate + c), found = value / (lanes(1.0f) + exponential(-value));
            std::memcpy(gate + c, &found, sizeof found);
        }
        round_to(dtype, gate, count);
        for (int64_t c = 0; c < count; c++) up[c] *= gate[c];
        narrow(up, count, dtype, row * n + start, out);
    }
}

// Queries and keys of [rows, (heads + 2 groups) * width] turned by position: queries to `query`, keys and values to
// columns[row] of slots[row] (null: of row). cos and sin: [rows, stride], of which the first `pairs` are for the pairs
// of a head.
extern "C" void glmquant_rotate(const void* qkv, int dtype, int64_t rows, int64_t heads, int64_t groups, int64_t width,
                                const void* cos, const void* sin, int64_t stride, int64_t pairs, void* query,
                                void* keys, void* values, int64_t capacity, const int64_t* slots,
                                const int64_t* columns) {
    const int64_t all = heads + 2 * groups;
    std::vector<float> head(static_cast<size_t>(width)), c(static_cast<size_t>(pairs)), s(static_cast<size_t>(pairs));
    std::vector<float> products[4];
    for (auto& product : products) product.resize(size_t(pairs));
    for (int64_t row = 0; row < rows; row++) {
        widen(cos, dtype, row * stride, pairs, c.data());
        widen(sin, dtype, row * stride, pairs, s.data());
        for (int64_t h = 0; h < all; h++) {
            widen(qkv, dtype, (row * all + h) * width, width, head.data());
            const int64_t group = h < heads ? 0 : (h - heads) % groups;
            if (h < heads + groups) {
                for (size_t i = 0; i < size_t(pairs); i++) {
                    const float even = head[2 * i], odd = head[2 * i + 1];
                    products[0][i] = even * c[i], products[1][i] = odd * s[i];
                    products[2][i] = odd * c[i], products[3][i] = even * s[i];
                }
                for (auto& product : products) round_to(dtype, product.data(), pairs);
                for (size_t i = 0; i < size_t(pairs); i++) {
                    head[2 * i] = products[0][i] - products[1][i];
                    head[2 * i + 1] = products[2][i] + products[3][i];
                }
            }
            const int64_t slot = slots ? slots[row] : row;
            const int64_t at = ((slot * groups + group) * capacity + columns[row]) * width;
            if (h < heads)
                narrow(head.data(), width, dtype, (row * heads + h) * width, query);
            else
                narrow(head.data(), width, dtype, at, h < heads + groups ? keys : values);
        }
    }
}

// Attention of one token of each row, query [rows, heads, width], to the columns of slots[row] (null: of row) from
// first[row] (null: 0) to last[row].
extern "C" void glmquant_attend(const void* query, int dtype, int64_t rows, int64_t heads, int64_t groups,
                                int64_t width, const void* keys, const void* values, int64_t capacity,
                                const int64_t* slots, const int64_t* first, const int64_t* last, float scale,
                                void* out) {
    const int64_t per_group = heads / groups, size = per_group * width, longest = *std::max_element(last, last + rows);
    const int64_t pieces = longest / kPiece + 1;
    std::vector<float> queries(size_t(rows * heads * width)), sums(size_t(rows * groups * pieces * size));
    std::vector<Part> parts(size_t(rows * groups * pieces * per_group), Part{-INFINITY, 0.0f});
    widen(query, dtype, 0, rows * heads * width, queries.data());
    for (float& value : queries) value *= scale;
    const int64_t item = dtype == kFloat ? 4 : 2;
#pragma omp parallel for schedule(dynamic) if (rows * groups * (longest + 1) * width > kLeast)
    for (int64_t task = 0; task < rows * groups * pieces; task++) {
        const int64_t piece = task % pieces, group = task / pieces, row = group / groups;
        const int64_t begin = std::max(piece * kPiece, first ? first[row] : 0);
        const int64_t end = std::min((piece + 1) * kPiece, last[row] + 1);
        if (begin >= end) continue;
        const int64_t place = ((slots ? slots[row] : row) * groups + group % groups) * capacity * width * item;
        const Group of{queries.data() + group * size, per_group, width, static_cast<const char*>(keys) + place,
                       static_cast<const char*>(values) + place, dtype};
        attend_to(of, begin, end, parts.data() + task * per_group, sums.data() + task * size);
    }
    std::vector<float> merged(static_cast<size_t>(width));
    for (int64_t head = 0; head < rows * heads; head++) {
        const int64_t group = head / per_group, inner = head % per_group;
        const auto part_of = [&](int64_t piece) { return parts[size_t((group * pieces + piece) * per_group + inner)]; };
        float largest = -INFINITY, total = 0.0f;
        for (int64_t piece = 0; piece < pieces; piece++) largest = std::max(largest, part_of(piece).largest);
        std::fill(merged.begin(), merged.end(), 0.0f);
        for (int64_t piece = 0; piece < pieces; piece++) {
            const Part part = part_of(piece);
            if (part.total == 0.0f) continue;  // nothing but padding
            const float factor = std::exp(part.largest - largest);
            total += factor * part.total;
            add_to(merged.data(), factor, sums.data() + (group * pieces + piece) * size + inner * width, width);
        }
        for (float& value : merged) value /= total;
        narrow(merged.data(), width, dtype, head * width, out);
    }
}
