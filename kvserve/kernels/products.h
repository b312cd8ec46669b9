// SPDX-License-Identifier: Apache-2.0
// How a kernel multiplies a number, or two of them, with what a page holds.
//
// `Widened` turns everything into float32. `Dots` takes bfloat16 as it is, two at a time,
// with the instruction that adds both products to a float32: twice the pace, for queries
// and pages of bfloat16. Weights lose what bfloat16 cannot hold, as they do on GPUs.

#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "pages.h"

namespace {

// Each kind has: `Number`, what is multiplied with a vector; `STEP`, numbers in it;
// `load` of PANEL columns of that many lines; `load_one`, of the first of them, where
// there is no other; and `ordered`, which puts sums in the order of the columns.
template <class Page> struct Widened {
    using Number = float;
    static constexpr int64_t STEP = 1;

    static Number query(Numbers numbers, int64_t d) { return numbers.get(d); }
    static Pair load(const Page *place, int64_t) { return ::load(place); }
    static Pair load_one(const Page *place) { return ::load(place); }
    static void add(Pair &sum, Number number, const Pair &columns) {
        sum.first += number * columns.first;
        sum.second += number * columns.second;
    }
    static Pair ordered(Pair sum) { return ::ordered(Page{}, sum); }
    static void round(float *, int64_t) {}
    static const Number *weights(const float *row) { return row; }
};

template <class Page, class Work>
void with_product(const Pool<Page> &pool, bool, Work work) {
    work(pool, Widened<Page>{});
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

struct Dots {
    typedef uint32_t Number __attribute__((may_alias));
    static constexpr int64_t STEP = 2;
    struct Columns {
        __m512bh first, second;
    };

    static Number query(Numbers numbers, int64_t d) {
        Number two;
        std::memcpy(&two, reinterpret_cast<uint16_t *>(numbers.first) + d, sizeof two);
        return two;
    }
    static Columns load(const uint16_t *place, int64_t stride) {
        return in_turns(_mm512_loadu_si512(place), _mm512_loadu_si512(place + stride));
    }
    static Columns load_one(const uint16_t *place) {
        return in_turns(_mm512_loadu_si512(place), _mm512_setzero_si512());
    }
    static void add(Pair &sum, Number two, const Columns &columns) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
        sum.first = (Floats)_mm512_dpbf16_ps((__m512)sum.first, both, columns.first);
        sum.second = (Floats)_mm512_dpbf16_ps((__m512)sum.second, both, columns.second);
    }
    // `in_turns` works on eighths of columns: the first vector has the lower half of each.
    static Pair ordered(Pair sum) {
        static constexpr Lanes LOW(
            [](int lane) { return lane / 8 * 4 + lane % 4 + lane / 4 % 2 * LANES; });
        return shuffled(sum, LOW, LANES / 2);
    }
    // Round a row of weights, a multiple of PANEL, where it lies.
    static void round(float *row, int64_t size) {
        for (int64_t i = 0; i < size; i += 2 * LANES) {
            const Pair both = {vector_at(row + i), vector_at(row + i + LANES)};
            const __m512bh halves =
                _mm512_cvtne2ps_pbh((__m512)both.second, (__m512)both.first);
            _mm512_storeu_si512(row + i / 2, (__m512i)halves);
        }
    }
    static const Number *weights(const float *row) {
        return reinterpret_cast<const Number *>(row);
    }

  private:
    static Columns in_turns(__m512i line, __m512i next) {
        return {
            (__m512bh)_mm512_unpacklo_epi16(line, next),
            (__m512bh)_mm512_unpackhi_epi16(line, next)};
    }
};

template <class Work>
void with_product(const Pool<uint16_t> &pool, bool is_half, Work work) {
    if (is_half)
        work(pool, Dots{});
    else
        work(pool, Widened<uint16_t>{});
}

#endif

// Let `work` have the pool, and the products to use, by the types of pages and queries.
template <class Work>
void with_products(
    int64_t kind, void *pool, int64_t page_size, int64_t width, bool is_half, Work work) {
    with_pool(kind, pool, page_size, width, [&](const auto &pages) {
        with_product(pages, is_half, work);
    });
}

} // namespace
