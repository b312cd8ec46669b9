// SPDX-License-Identifier: Apache-2.0
// What kernels that read head pages share.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// 2 * LANES numbers as two vectors that hold them in turns: `ordered` puts them in order.
inline Pair load(const uint16_t *place) {
    Words both;
    std::memcpy(&both, place, sizeof both);
    return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}

inline Pair load(const float *place) {
    // One copy of both would go through memory.
    Pair both;
    std::memcpy(&both.first, place, sizeof both.first);
    std::memcpy(&both.second, place + LANES, sizeof both.second);
    return both;
}

inline Pair ordered(uint16_t, Pair turns) { return interleaved(turns); }
inline Pair ordered(float, Pair both) { return both; }

// Pages as the CPU's kernels lay them out: keys [width, page_size], then values
// [page_size, width].
template <class Number> struct Pool {
    const Number *numbers;
    int64_t page_size, width;

    const Number *keys(int64_t page) const {
        return numbers + page * 2 * page_size * width;
    }
    const Number *values(int64_t page) const {
        return keys(page) + page_size * width;
    }
};

} // namespace
