// SPDX-License-Identifier: Apache-2.0
// Keys and values on their way to pages of another type than the model's.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "pages.h"

namespace {

// Rows below which waking other threads takes longer than the work.
constexpr int64_t WORTH_THREADS = 64;
// Less, and what is divided by it, would be no number.
constexpr float LEAST_SCALE = 1e-6f;

// The scale that makes the greatest of a token's numbers the greatest of its kind.
template <class Page> float scale_of(Numbers numbers, int64_t width) {
    float most = 0;
    for (int64_t d = 0; d < width; ++d)
        most = std::max(most, std::abs(numbers.get(d)));
    return std::max(most / MOST<Page>, LEAST_SCALE);
}

// Put a token's numbers `step` apart, and say what they are to be multiplied with.
template <class Page>
float put(Numbers numbers, int64_t width, int64_t step, Page *place) {
    const float scale = is_scaled<Page> ? scale_of<Page>(numbers, width) : 1;
    for (int64_t d = 0; d < width; ++d)
        place[d * step] = stored<Page>(numbers.get(d) / scale);
    return scale;
}

template <class Page>
void write(
    const int64_t *slots, int64_t count, const Pool<Page> &pool, Numbers keys,
    Numbers values) {
    const int64_t size = pool.page_size, width = pool.width;
#pragma omp parallel for schedule(static) if (count > WORTH_THREADS)
    for (int64_t row = 0; row < count; ++row) {
        const int64_t page = slots[row] / size, token = slots[row] % size;
        const float of_keys =
            put(keys.from(row * width), width, size, pool.keys(page) + token);
        const float of_values =
            put(values.from(row * width), width, 1, pool.values(page) + token * width);
        if (is_scaled<Page>) {
            pool.key_scales(page)[token] = of_keys;
            pool.value_scales(page)[token] = of_values;
        }
    }
}

} // namespace

// Keys and values are [count, width], contiguous, bfloat16 or float32.
extern "C" void write_pages(
    const int64_t *slots, int64_t count, int64_t kind, void *pool, int64_t page_size,
    int64_t width, int64_t is_half, const void *keys, const void *values) {
    with_pool(kind, pool, page_size, width, [&](const auto &pages) {
        write(slots, count, pages, {keys, is_half}, {values, is_half});
    });
}
