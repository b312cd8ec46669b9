// SPDX-License-Identifier: Apache-2.0
// What the kernels of a CPU share: vectors of its own width, numbers, powers of two.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

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

inline float total(Floats numbers) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane)
        sum += numbers[lane];
    return sum;
}

inline float highest(const float *row, int64_t size) {
    Floats most = vector_at(row);
    for (int64_t i = LANES; i < size; i += LANES) {
        const Floats next = vector_at(row + i);
        most = next > most ? next : most;
    }
    float top = most[0];
    for (int lane = 1; lane < LANES; ++lane)
        top = std::max(top, most[lane]);
    return top;
}

inline void store(float *place, Pair both) {
    vector_at(place) = both.first;
    vector_at(place + LANES) = both.second;
}

// The numbers of two vectors in turns: first[0], second[0], first[1], ...
inline Pair interleaved(Pair turns) {
    Ints low, high;
    for (int lane = 0; lane < LANES; ++lane) {
        low[lane] = lane / 2 + lane % 2 * LANES;
        high[lane] = low[lane] + LANES / 2;
    }
    return {
        __builtin_shuffle(turns.first, turns.second, low),
        __builtin_shuffle(turns.first, turns.second, high)};
}

// 2 to the power of x <= 0, to float32 rounding; what would be subnormal is 0.
inline Floats power_of_two(Floats x) {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the last bits.
    const Floats shifted = x + 12582912.0f;
    const Floats rest = x - (shifted - 12582912.0f);
    // Taylor's series: ln(2)^k / k!, the rest being at most a half.
    Floats series = rest * 1.5252734e-5f + 1.5403530e-4f;
    series = series * rest + 1.3333558e-3f;
    series = series * rest + 9.6181291e-3f;
    series = series * rest + 5.5504109e-2f;
    series = series * rest + 2.4022651e-1f;
    series = series * rest + 6.9314718e-1f;
    series = series * rest + 1.0f;
    const Ints exponent = (Ints)shifted << 23;
    return x > -126.0f ? (Floats)((Ints)series + exponent) : Floats{};
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
