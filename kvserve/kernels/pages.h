// SPDX-License-Identifier: Apache-2.0
// What kernels that touch head pages share: how numbers lie in a page.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// What a page holds: float, bfloat16, and two kinds of bytes, which are multiplied with
// a scale of their token.
using Float8 = uint8_t; // e4m3
using Int8 = int8_t;

template <class Page> constexpr bool is_scaled = sizeof(Page) == 1;

// What a byte of 1 stands for: powers of two that `to_float` and `load` leave out.
template <class Page> constexpr float UNIT = 1;
template <> constexpr float UNIT<Float8> = 256;

// The greatest number of a kind of bytes, which the greatest of a token becomes.
template <class Page> constexpr float MOST = 0;
template <> constexpr float MOST<Float8> = 448;
template <> constexpr float MOST<Int8> = 127;

inline float to_float(Int8 number) { return number; }

// As if its exponent were that of float16, which is 8 less: so `load` finds it.
inline float to_float(Float8 bits) {
    const int exponent = bits >> 3 & 15, rest = bits & 7;
    const float size = exponent
        ? std::ldexp(float(8 + rest), exponent - 10 - 8)
        : std::ldexp(float(rest), -9 - 8);
    return bits & 0x80 ? -size : size;
}

template <class Page> inline Page stored(float number);
template <> inline float stored<float>(float number) { return number; }
template <> inline uint16_t stored<uint16_t>(float number) { return rounded(number); }

template <> inline Int8 stored<Int8>(float number) {
    return Int8(std::nearbyint(std::min(std::max(number, -127.0f), 127.0f)));
}

template <> inline Float8 stored<Float8>(float number) {
    const float size = std::min(std::abs(number), MOST<Float8>);
    const uint8_t sign = std::signbit(number) ? 0x80 : 0;
    // Below the least normal number, steps are 2^-9.
    if (size < 0x1p-6f)
        return sign | uint8_t(std::nearbyint(size * 512));
    uint32_t bits;
    std::memcpy(&bits, &size, sizeof bits);
    // To nearest, ties to even; then the exponent's bias becomes 7 instead of 127.
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | uint8_t((bits >> 20) - (120 << 3));
}

// 2 * LANES numbers as two vectors: bfloat16 in turns, which `ordered` puts in order.
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

inline Floats vector_of(const Int8 *place) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(place));
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(place));
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    Floats numbers;
    for (int lane = 0; lane < LANES; ++lane)
        numbers[lane] = place[lane];
    return numbers;
#endif
}

inline Floats vector_of(const Float8 *place) {
#if defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepu8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(place)));
    const __m256i size = _mm256_slli_epi16(
        _mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    const __m256i sign = _mm256_slli_epi16(
        _mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    return (Floats)_mm512_cvtph_ps(_mm256_or_si256(size, sign));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i wide = _mm_cvtepu8_epi16(
        _mm_loadl_epi64(reinterpret_cast<const __m128i *>(place)));
    const __m128i size = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7);
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    return (Floats)_mm256_cvtph_ps(_mm_or_si128(size, sign));
#else
    Floats numbers;
    for (int lane = 0; lane < LANES; ++lane)
        numbers[lane] = to_float(place[lane]);
    return numbers;
#endif
}

inline Pair load(const Int8 *place) { return {vector_of(place), vector_of(place + LANES)}; }
inline Pair load(const Float8 *place) {
    return {vector_of(place), vector_of(place + LANES)};
}

template <class Page> inline Pair ordered(Page, Pair both) { return both; }
inline Pair ordered(uint16_t, Pair turns) { return interleaved(turns); }

// A pool: of each page its keys [width, page_size], its values [page_size, width], and,
// where they are bytes, scales of its tokens' keys and then of their values.
template <class Page> struct Pool {
    char *bytes;
    int64_t page_size, width;

    int64_t page_bytes() const {
        const int64_t scales = is_scaled<Page> ? 2 * page_size * sizeof(float) : 0;
        return 2 * page_size * width * sizeof(Page) + scales;
    }
    Page *keys(int64_t page) const {
        return reinterpret_cast<Page *>(bytes + page * page_bytes());
    }
    Page *values(int64_t page) const { return keys(page) + page_size * width; }
    float *key_scales(int64_t page) const {
        return reinterpret_cast<float *>(keys(page) + 2 * page_size * width);
    }
    float *value_scales(int64_t page) const { return key_scales(page) + page_size; }
};

// Multiply rows of numbers, `stride` apart and one for each token from `first` on, with
// those tokens' scales of keys, or of values. `first` is a multiple of 32.
template <class Page>
inline void apply_scales(
    const Pool<Page> &pool, bool of_keys, const int32_t *pages, int64_t first,
    int64_t count, int rows, int64_t stride, float *numbers) {
    for (int64_t token = 0; token < count; token += 2 * LANES) {
        const int64_t at = first + token, page = pages[at / pool.page_size];
        const float *scales = of_keys ? pool.key_scales(page) : pool.value_scales(page);
        const Pair scale = load(scales + at % pool.page_size);
        for (int row = 0; row < rows; ++row) {
            float *own = numbers + row * stride + token;
            vector_at(own) *= scale.first * UNIT<Page>;
            vector_at(own + LANES) *= scale.second * UNIT<Page>;
        }
    }
}

// How Python numbers what a page may hold.
enum class Kind : int64_t { float32, bfloat16, float8, int8 };

// Let `work` have the pool, by the type of what its pages hold.
template <class Work>
void with_pool(int64_t kind, void *pool, int64_t page_size, int64_t width, Work work) {
    char *const bytes = static_cast<char *>(pool);
    switch (Kind(kind)) {
    case Kind::float32:
        return work(Pool<float>{bytes, page_size, width});
    case Kind::bfloat16:
        return work(Pool<uint16_t>{bytes, page_size, width});
    case Kind::float8:
        return work(Pool<Float8>{bytes, page_size, width});
    case Kind::int8:
        return work(Pool<Int8>{bytes, page_size, width});
    }
}

} // namespace
