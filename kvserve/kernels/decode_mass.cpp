// SPDX-License-Identifier: Apache-2.0
// Statistics of a decode step over head pages: statistics.add_row_attention and
// statistics.lightest_slots on a CPU.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "numbers.h"
#include "pages.h"
#include "scores.h"

namespace {

// Query heads, and vectors of tokens, that are multiplied together.
constexpr int HEADS = 4, VECTORS = 2;
// Tokens below which waking other threads takes longer than the work.
constexpr int64_t WORTH_THREADS = 2048;

// Cached tokens of `count` rows of a page table.
struct Rows {
    const int32_t *table;
    int64_t stride;
    const int64_t *lengths, *rows;
    int64_t count, page_size;

    int64_t pages(int64_t row) const {
        return (lengths[row] + page_size - 1) / page_size;
    }
    const int32_t *list(int64_t row) const { return table + row * stride; }
    int64_t page(int64_t row, int64_t number) const { return list(row)[number]; }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t i = 0; i < count; ++i)
            most = std::max(most, pages(rows[i]) * page_size);
        return most;
    }
};

// A pool's keys.
template <class Page> struct Keys {
    Pool<Page> pool;
    // Where a page has number d of token t, at [d][t]; none where it is just there.
    const int32_t *places;

    void unpack(int64_t page, float *out) const {
        const int64_t size = pool.page_size, numbers = size * pool.width;
        const Page *packed = pool.keys(page);
        if (places == nullptr)
            for (int64_t i = 0; i < numbers; ++i)
                out[i] = to_float(packed[i]);
        else
            for (int64_t i = 0; i < numbers; ++i)
                out[i] = to_float(packed[places[i]]);
        if (is_scaled<Page>)
            for (int64_t i = 0; i < numbers; ++i)
                out[i] *= pool.key_scales(page)[i % size] * UNIT<Page>;
    }
};

// What one row's query heads attend to, a row at a time.
template <class Page> class RowAttention {
  public:
    RowAttention(
        const Rows &rows, const Keys<Page> &keys, int64_t group, const Form &form)
        : rows_(rows), keys_(keys), group_(group), form_(form), factor_(form.factor()),
          quads_((group + HEADS - 1) / HEADS), room_(rows.longest()),
          width_(keys.pool.width), queries_(quads_ * HEADS * width_),
          page_(rows.page_size * width_),
          weights_(quads_ * HEADS * room_) {}

    // Add it to the mass of each token.
    void run(Numbers query, int64_t row, float *mass) {
        pack_queries(query);
        const int64_t pages = rows_.pages(row), size = rows_.page_size;
        for (int64_t i = 0; i < pages; ++i) {
            keys_.unpack(rows_.page(row, i), page_);
            for (int64_t quad = 0; quad < quads_; ++quad)
                for (int64_t token = 0; token < size; token += VECTORS * LANES)
                    multiply(quad, token, i * size + token);
        }
        for (int64_t head = 0; head < group_; ++head)
            normalise(head, row, pages * size);
        for (int64_t i = 0; i < pages; ++i) {
            float *own = mass + rows_.page(row, i) * size;
            for (int64_t token = 0; token < size; ++token)
                own[token] += weights_[i * size + token];
        }
    }

  private:
    void pack_queries(Numbers query) {
        for (int64_t head = 0; head < quads_ * HEADS; ++head)
            for (int64_t d = 0; d < width_; ++d)
                queries_[(head / HEADS * width_ + d) * HEADS + head % HEADS] =
                    head < group_ ? query.get(head * width_ + d) : 0;
    }

    void multiply(int64_t quad, int64_t token, int64_t column) {
        const float *queries = queries_ + quad * width_ * HEADS;
        Floats sum[HEADS][VECTORS] = {};
        for (int64_t d = 0; d < width_; ++d)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; ++i) {
                const float *keys = page_ + d * rows_.page_size + token + i * LANES;
#pragma GCC unroll 8
                for (int head = 0; head < HEADS; ++head)
                    sum[head][i] += queries[d * HEADS + head] * vector_at(keys);
            }
        for (int head = 0; head < HEADS; ++head) {
            float *weights = weights_ + (quad * HEADS + head) * room_ + column;
            for (int i = 0; i < VECTORS; ++i)
                vector_at(weights + i * LANES) = sum[head][i] * factor_;
        }
    }

    // Turn a head's logits into attention, and gather it in the first head's place.
    void normalise(int64_t head, int64_t row, int64_t size) {
        float *weights = weights_ + head * room_, *sum = weights_, total, sink, more;
        const int64_t kv_head = form_.kv_head(row);
        if (form_.bends())
            form_.bend(
                form_.head(kv_head, head, form_.token(row)), keys_.pool, rows_.list(row),
                0, size, weights);
        const float top = exponentiate(weights, rows_.lengths[row], size, total);
        form_.start(kv_head, head, sink, more);
        if (more > 0)
            total += std::exp2(sink - top);
        const float share = 1 / total;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats drawn = vector_at(weights + i) * share;
            vector_at(sum + i) = head ? vector_at(sum + i) + drawn : drawn;
        }
    }

    const Rows rows_;
    const Keys<Page> keys_;
    const int64_t group_;
    const Form form_;
    const float factor_;
    const int64_t quads_, room_, width_;
    Buffer<float> queries_, page_, weights_;
};

template <class Page>
void add_attention(
    const Rows &rows, const Pool<Page> &pool, const int32_t *places, Numbers query,
    int64_t group, const Form &form, float *mass) {
    const Keys<Page> keys{pool, places};
    const int64_t longest = rows.longest();
#pragma omp parallel if (longest * rows.count > WORTH_THREADS)
    {
        RowAttention<Page> attention(rows, keys, group, form);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows.count; ++i) {
            const int64_t row = rows.rows[i];
            attention.run(query.from(row * group * pool.width), row, mass);
        }
    }
}

int64_t lightest(
    const Rows &rows, int64_t row, const float *mass, const int32_t *position,
    int32_t own, int64_t safe_from, bool by_count) {
    float least = std::numeric_limits<float>::infinity();
    int32_t earliest = 0;
    int64_t found = -1;
    for (int64_t token = 0; token < rows.lengths[row]; ++token) {
        const int64_t page = rows.page(row, token / rows.page_size);
        const int64_t slot = page * rows.page_size + token % rows.page_size;
        const int32_t at = position[slot];
        if (at < 0 || at >= safe_from)
            continue;
        const float weight = by_count ? mass[slot] / float(own - at) : mass[slot];
        if (found < 0 || weight < least || (weight == least && at < earliest)) {
            least = weight;
            earliest = at;
            found = slot;
        }
    }
    return found;
}

} // namespace

// Arrays are contiguous, but for the page table, whose rows are `stride` apart; what is
// said of each row is indexed by its number in the table. Mass and position are
// [num_pages, page_size].
extern "C" {

void add_row_attention(
    const int32_t *table, int64_t stride, const int64_t *lengths, const int64_t *rows,
    int64_t count, int64_t page_size, int64_t kind, void *pool, const int32_t *places,
    int64_t width, int64_t is_half, const void *query, int64_t group, float scale,
    float *mass, const Scores *scores) {
    const Rows cached{table, stride, lengths, rows, count, page_size};
    with_pool(kind, pool, page_size, width, [&](const auto &pages) {
        add_attention(
            cached, pages, places, {query, is_half}, group, {scores, group, scale}, mass);
    });
}

void lightest_slots(
    const int32_t *table, int64_t stride, const int64_t *lengths, const int64_t *rows,
    int64_t count, int64_t page_size, const float *mass, const int32_t *position,
    const int32_t *own, const int64_t *safe_from, int64_t by_count, int64_t *slots) {
    const Rows cached{table, stride, lengths, rows, count, page_size};
    const int64_t longest = cached.longest();
#pragma omp parallel for schedule(static) if (longest * count > WORTH_THREADS)
    for (int64_t i = 0; i < count; ++i)
        slots[i] = lightest(
            cached, rows[i], mass, position, own[rows[i]], safe_from[rows[i]],
            by_count != 0);
}
}
