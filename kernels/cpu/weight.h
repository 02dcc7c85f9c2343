// A packed weight as the kernels are given it; how they are laid out is said in linear.cpp.

#pragma once

#include "fixed.h"

namespace {

struct Weight {
    const uint32_t* packed;
    int64_t rows, words, columns, groups, width;
    const void* scale;
    int scale_dtype;
    const int8_t* zero;
    const void* bias;
    int bias_dtype;
};

}  // namespace
