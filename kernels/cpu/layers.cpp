// All layers of a model for one token of each of some sequences, in one call: the functions of decode.cpp, linear.cpp
// and matmul.cpp, one after the other. Called one by one from Python, those of a small model take longer to call than
// to run.

#include <cstddef>
#include <vector>

#include "common.h"

extern "C" {
void glmquant_rms_norm(void* x, const void* delta, const void* weight, int dtype, int64_t rows, int64_t columns,
                       float epsilon, void* out);
void glmquant_silu_product(const void* both, int dtype, int64_t rows, int64_t n, void* out);
void glmquant_rotate(const void* qkv, int dtype, int64_t rows, int64_t heads, int64_t groups, int64_t width,
                     const void* cos, const void* sin, int64_t stride, int64_t pairs, void* query, void* keys,
                     void* values, int64_t capacity, const int64_t* slots, const int64_t* columns);
void glmquant_attend(const void* query, int dtype, int64_t rows, int64_t heads, int64_t groups, int64_t width,
                     const void* keys, const void* values, int64_t capacity, const int64_t* slots,
                     const int64_t* first, const int64_t* last, float scale, void* out);
void glmquant_linear(const void* x, int dtype, int64_t x_rows, int64_t columns, const uint32_t* packed, int64_t rows,
                     int64_t words, int bits, const void* scale, int scale_dtype, int64_t groups, const int8_t* zero,
                     const void* bias, int bias_dtype, int planes, void* y);
void glmquant_matmul(const void* x, int dtype, int64_t x_rows, int64_t columns, const uint32_t* packed, int64_t rows,
                     int64_t words, int bits, const void* scale, int scale_dtype, int64_t groups, const int8_t* zero,
                     const void* bias, int bias_dtype, int planes, void* y);
}

// What follows is written by glmquant/ops/layers_native.py, field by field.

// x -> x @ W.T + bias, see linear.cpp.
struct Product {
    const uint32_t* packed;
    const void* scale;
    const int8_t* zero;
    const void* bias;
    int64_t rows, columns, words, groups, bits, scale_dtype, bias_dtype, planes;
};

struct Layer {
    const void *input_norm, *middle_norm;
    void *keys, *values;  // see decode.cpp
    Product qkv, out, gate_up, down;
};

struct Sizes {
    int64_t dtype, layers, hidden, heads, groups, width, capacity;
    double scale, epsilon;
};

// The tokens of a call: cos and sin are [rows, rotary]; slots and first may be null.
struct Tokens {
    int64_t rows, few, rotary;
    const void *cos, *sin;
    const int64_t *slots, *first, *columns;
};

namespace {

void multiply(const Product& by, const Tokens& tokens, int dtype, const void* x, void* y) {
    (tokens.few ? glmquant_linear : glmquant_matmul)(
        x, dtype, tokens.rows, by.columns, by.packed, by.rows, by.words, int(by.bits), by.scale, int(by.scale_dtype),
        by.groups, by.zero, by.bias, int(by.bias_dtype), int(by.planes), y);
}

}  // namespace

// hidden [rows, hidden] and delta [rows, hidden], which is to be added to it, become those behind the last layer;
// `delta` is not read.
extern "C" void glmquant_layers(const Layer* layers, const Sizes* sizes, const Tokens* tokens, void* hidden,
                                void* delta) {
    const Sizes& s = *sizes;
    const Tokens& t = *tokens;
    const int dtype = int(s.dtype);
    const size_t item = dtype == kFloat ? 4 : 2, rows = size_t(t.rows);
    std::vector<char> x(rows * size_t(s.hidden) * item), qkv(rows * size_t((s.heads + 2 * s.groups) * s.width) * item),
        query(rows * size_t(s.heads * s.width) * item), mixed(query.size()),
        both(rows * size_t(layers->gate_up.rows) * item), inner(rows * size_t(layers->down.columns) * item);
    for (int64_t i = 0; i < s.layers; i++) {
        const Layer& layer = layers[i];
        glmquant_rms_norm(hidden, i ? delta : nullptr, layer.input_norm, dtype, t.rows, s.hidden, float(s.epsilon),
                          x.data());
        multiply(layer.qkv, t, dtype, x.data(), qkv.data());
        glmquant_rotate(qkv.data(), dtype, t.rows, s.heads, s.groups, s.width, t.cos, t.sin, t.rotary, t.rotary / 2,
                        query.data(), layer.keys, layer.values, s.capacity, t.slots, t.columns);
        glmquant_attend(query.data(), dtype, t.rows, s.heads, s.groups, s.width, layer.keys, layer.values, s.capacity,
                        t.slots, t.first, t.columns, float(s.scale), mixed.data());
        multiply(layer.out, t, dtype, mixed.data(), delta);
        glmquant_rms_norm(hidden, delta, layer.middle_norm, dtype, t.rows, s.hidden, float(s.epsilon), x.data());
        multiply(layer.gate_up, t, dtype, x.data(), both.data());
        glmquant_silu_product(both.data(), dtype, t.rows, layer.down.columns, inner.data());
        multiply(layer.down, t, dtype, inner.data(), delta);
    }
}
