// SPDX-License-Identifier: Apache-2.0
// Numbers of a model, whose type is known when a kernel runs: queries, outputs, keys and
// values on their way to a page.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

// float32, or bfloat16.
struct Numbers {
    char *first;
    bool is_half;

    Numbers(const void *place, int64_t is_half)
        : first(static_cast<char *>(const_cast<void *>(place))), is_half(is_half != 0) {}

    Numbers from(int64_t index) const {
        return {first + index * (is_half ? sizeof(uint16_t) : sizeof(float)), is_half};
    }
    float get(int64_t index) const {
        return is_half ? to_float(reinterpret_cast<const uint16_t *>(first)[index])
                       : reinterpret_cast<const float *>(first)[index];
    }
    void put(int64_t index, float number) const {
        if (is_half)
            reinterpret_cast<uint16_t *>(first)[index] = rounded(number);
        else
            reinterpret_cast<float *>(first)[index] = number;
    }
};

} // namespace
