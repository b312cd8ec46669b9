// SPDX-License-Identifier: Apache-2.0
// A hole in a row's keys: places of a page that is only partly filled, with pages behind.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

// Keys [first, last) of a row, which none of its queries sees. They get weights of 0, so
// keys there may be anything, but values, and scales, must be numbers.
struct Gap {
    int64_t first, last;

    // Of `gaps` [rows, 2], or none.
    static Gap of(const int32_t *gaps, int64_t row) {
        return gaps ? Gap{gaps[2 * row], gaps[2 * row + 1]} : Gap{0, 0};
    }

    // Hide it from the logits of `count` keys from `start` on.
    void hide(float *logits, int64_t start, int64_t count) const {
        static constexpr Lanes IN_ORDER([](int lane) { return lane; });
        const int64_t from = std::max<int64_t>(first - start, 0);
        const int64_t to = std::min(last - start, count);
        // Whole vectors: whoever loads one after single numbers were stored to it waits.
        for (int64_t i = from / LANES * LANES; i < to; i += LANES) {
            const Ints key = Ints(IN_ORDER) + int32_t(i);
            const Ints hidden = key >= int32_t(from) & key < int32_t(to);
            vector_at(logits + i) = hidden ? Floats{} + NEVER : vector_at(logits + i);
        }
    }
};

} // namespace
