// SPDX-License-Identifier: Apache-2.0
// What the kernels of a CPU share: vectors of its own width, numbers, powers of two.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct Pair {
    Floats first, second;
};

template <class Item> class Buffer {
  public:
    explicit Buffer(int64_t size)
        : items_(static_cast<Item *>(operator new(size * sizeof(Item), ALIGNMENT))) {}
    ~Buffer() { operator delete(items_, ALIGNMENT); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    operator Item *() const { return items_; }

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
    Item *items_;
};

// The vector at a place of a buffer, which must be a multiple of LANES.
inline Floats &vector_at(float *place) { return *reinterpret_cast<Floats *>(place); }
inline const Floats &vector_at(const float *place) {
    return *reinterpret_cast<const Floats *>(place);
}

inline float to_float(float number) { return number; }

inline float to_float(uint16_t bfloat16) {
    const uint32_t bits = uint32_t(bfloat16) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// The bfloat16 that is nearest; ties to even.
inline uint16_t rounded(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Floats higher(Floats one, Floats other) { return one > other ? one : other; }

// The lanes that a shuffle takes; a constant, since compilers do not find out that it is.
struct Lanes {
    alignas(64) int32_t from[LANES] = {};

    template <class Map> explicit constexpr Lanes(Map map) {
        for (int lane = 0; lane < LANES; ++lane)
            from[lane] = map(lane);
    }
    operator Ints() const { return *reinterpret_cast<const Ints *>(from); }
};

template <int apart, class Both> inline Floats joined(Floats numbers, Both both) {
    static constexpr Lanes PARTNER([](int lane) { return lane ^ apart; });
    return both(numbers, __builtin_shuffle(numbers, Ints(PARTNER)));
}

// Join the lanes of a vector by halves, so that few have to wait for each other.
template <class Both> inline float folded(Floats numbers, Both both) {
    if (LANES == 16)
        numbers = joined<8>(numbers, both);
    if (LANES >= 8)
        numbers = joined<4>(numbers, both);
    return joined<1>(joined<2>(numbers, both), both)[0];
}

inline float total(Floats numbers) {
    return folded(numbers, [](Floats one, Floats other) { return one + other; });
}

inline float highest(const float *row, int64_t size) {
    Floats most = vector_at(row);
    for (int64_t i = LANES; i < size; i += LANES)
        most = higher(vector_at(row + i), most);
    return folded(most, higher);
}

inline void store(float *place, Pair both) {
    vector_at(place) = both.first;
    vector_at(place + LANES) = both.second;
}

// A shuffle of both vectors, and the same of the lanes `further` on.
inline Pair shuffled(Pair both, Ints from, int32_t further) {
    return {
        __builtin_shuffle(both.first, both.second, from),
        __builtin_shuffle(both.first, both.second, from + further)};
}

// The numbers of two vectors in turns: first[0], second[0], first[1], ...
inline Pair interleaved(Pair turns) {
    static constexpr Lanes LOW([](int lane) { return lane / 2 + lane % 2 * LANES; });
    return shuffled(turns, LOW, LANES / 2);
}

// Cut x <= 0 into the nearest integer and a rest; and multiply a number with 2 to the
// power of that integer, to 0 where x is so low that it would be subnormal.
#if defined(__AVX512DQ__)
struct Exponent {
    Floats rest;
    explicit Exponent(Floats x)
        : rest((Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT)), x_(x) {}
    Floats raise(Floats number) const {
        const __mmask16 normal = _mm512_cmp_ps_mask(
            (__m512)x_, _mm512_set1_ps(-126.0f), _CMP_GT_OQ);
        return (Floats)_mm512_maskz_scalef_ps(
            normal, (__m512)number, (__m512)(x_ - rest));
    }

  private:
    Floats x_;
};
#else
struct Exponent {
    Floats rest;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the last bits.
    explicit Exponent(Floats x) : x_(x), shifted_(x + 12582912.0f) {
        rest = x - (shifted_ - 12582912.0f);
    }
    Floats raise(Floats number) const {
        const Ints exponent = (Ints)shifted_ << 23;
        return x_ > -126.0f ? (Floats)((Ints)number + exponent) : Floats{};
    }

  private:
    Floats x_, shifted_;
};
#endif

// 2 to the power of x <= 0, to float32 rounding; what would be subnormal is 0.
inline Floats power_of_two(Floats x) {
    const Exponent exponent(x);
    const Floats rest = exponent.rest;
    // Taylor's series: ln(2)^k / k!, the rest being at most a half.
    Floats series = rest * 1.5252734e-5f + 1.5403530e-4f;
    series = series * rest + 1.3333558e-3f;
    series = series * rest + 9.6181291e-3f;
    series = series * rest + 5.5504109e-2f;
    series = series * rest + 2.4022651e-1f;
    series = series * rest + 6.9314718e-1f;
    series = series * rest + 1.0f;
    return exponent.raise(series);
}

// Turn `size` logits (base 2), of which the first `seen` are visible, into powers below
// their maximum, zeros behind. Returns the maximum, and the sum of the powers.
inline float exponentiate(float *row, int64_t seen, int64_t size, float &mass) {
    if (seen < size)
        std::fill(row + std::max<int64_t>(seen, 0), row + size, NEVER);
    const float top = highest(row, size);
    // Where nothing is visible, NEVER less NEVER would be no number.
    const float base = seen > 0 ? top : 0;
    Floats sum = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Floats &place = vector_at(row + i);
        place = power_of_two(place - base);
        sum += place;
    }
    mass = total(sum);
    return top;
}

} // namespace
