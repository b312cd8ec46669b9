// SPDX-License-Identifier: Apache-2.0
// Attention of prompts over head pages on a CPU: many queries a row, at the pace of
// arithmetic.
//
// A row's queries, times its query heads, are cut into tiles. A tile goes through the
// row's keys once, a block at a time, which stays in a near cache while ROWS
// (query, head) pairs after the other multiply it, soften their logits and add up values.
// Sums are float32, in an order that depends on the row alone; how numbers are multiplied
// says `products.h`.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gaps.h"
#include "products.h"
#include "scores.h"

namespace {

// ROWS x one pair of vectors of sums fill the registers.
constexpr int ROWS = REGISTERS / 8 * 3;
constexpr int64_t PANEL = 2 * LANES;
// Keys that are softened together: the fewer times, the better, as long as they and their
// values stay in a second-level cache.
constexpr int64_t BLOCK = 256;
// (query, head) pairs of a tile at most: their queries and sums stay in a second-level
// cache, and every page is fetched once for all of them.
constexpr int64_t MOST_PAIRS = 128;
// Tokens between what is multiplied and what is fetched: pages lie anywhere, so no hardware
// foresees the next. Few pairs, such as those of guessed tokens, would wait for it.
constexpr int64_t AHEAD = 96;

// Tokens [first, last) of a row's queries.
struct Tile {
    int64_t row, first, last;
};

// Values of tokens that lie one behind the other.
template <class Page> struct Run {
    const Page *values;
    int64_t count;
};

// Keys and values of PANEL tokens that are to be multiplied later.
template <class Page> struct Ahead {
    const Page *keys, *values;
};

template <int64_t count, class Page> inline void fetch(const Page *numbers) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; i += 64 / sizeof(Page))
        __builtin_prefetch(numbers + i);
}

// Multiply ROWS queries [ROWS, width / STEP] with PANEL tokens' keys, `stride` apart, and
// fetch what is ahead, unless it has been.
template <bool fetches, class Product, class Page>
inline void multiply(
    const typename Product::Number *queries, const Page *keys, const Ahead<Page> &ahead,
    int64_t width, int64_t stride, float *logits) {
    constexpr int64_t STEP = Product::STEP;
    const int64_t numbers = width / STEP;
    Pair sum[ROWS] = {};
    for (int64_t i = 0; i < numbers; ++i) {
        if constexpr (fetches)
            for (int64_t d = i * STEP; d < (i + 1) * STEP; ++d) {
                fetch<PANEL>(ahead.keys + d * stride);
                fetch<PANEL>(ahead.values + d * PANEL);
            }
        const auto key = Product::load(keys + i * Product::STEP * stride, stride);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
            Product::add(sum[row], queries[row * numbers + i], key);
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
        store(logits + row * BLOCK, Product::ordered(sum[row]));
}

// Add PANEL dimensions of the runs' values, weighted, to ROWS sums `width` apart.
template <class Product, class Page>
inline void accumulate(
    const typename Product::Number *weights, const Run<Page> *runs, int64_t count,
    int64_t width, int64_t dimension, float *sums) {
    constexpr int64_t STEP = Product::STEP;
    Pair sum[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
        sum[row] = {
            vector_at(sums + row * width), vector_at(sums + row * width + LANES)};
    const auto add = [&](const auto &value, int64_t i) {
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row)
            Product::add(sum[row], weights[row * BLOCK + i], value);
    };
    for (int64_t run = 0; run < count; ++run) {
        const Page *values = runs[run].values + dimension;
        const int64_t tokens = runs[run].count, numbers = tokens / STEP;
        for (int64_t i = 0; i < numbers; ++i)
            add(Product::load(values + i * STEP * width, width), i);
        if (tokens % STEP)
            add(Product::load_one(values + (tokens - 1) * width), numbers);
        weights += numbers;
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
        store(sums + row * width, sum[row]);
}

// A row: its queries, the keys that the last of them sees, and its pages; the token of
// its first query, and its KV head; and keys that no query sees.
struct Row {
    int64_t count, keys;
    const int32_t *pages;
    int64_t token, kv_head;
    Gap gap;
};

// Where the (query, head) pairs of a row lie: queries `stride` apart, a query's heads one
// behind the other.
struct Pairs {
    Numbers first;
    int64_t stride, group, width;

    Numbers at(int64_t query, int64_t pair) const {
        return first.from((query + pair / group) * stride + pair % group * width);
    }
};

// The online softmax of a tile.
template <class Page, class Product> class Attention {
    using Number = typename Product::Number;

  public:
    Attention(const Pool<Page> &pool, int64_t group, const Form &form)
        : pool_(pool), group_(group), form_(form), factor_(form.factor()),
          most_((std::max(MOST_PAIRS, group) + ROWS - 1) / ROWS * ROWS),
          queries_(most_ * pool.width / Product::STEP), sums_(most_ * pool.width), peaks_(most_),
          masses_(most_), logits_(ROWS * BLOCK) {}

    void run(
        const Row &row, const Tile &tile, const Pairs &query, const Pairs &out) {
        const int64_t pairs = (tile.last - tile.first) * group_;
        const int64_t padded = (pairs + ROWS - 1) / ROWS * ROWS;
        start(row, query, tile.first, pairs, padded);
        // Of all pairs' keys, those that the tile's first query sees.
        const int64_t first_seen = row.keys - row.count + tile.first + 1;
        const int64_t last_seen = row.keys - row.count + tile.last;
        for (int64_t key = 0; key < last_seen; key += BLOCK) {
            const int64_t count = std::min(BLOCK, last_seen - key);
            for (int64_t pair = 0; pair < padded; pair += ROWS) {
                const int64_t least = first_seen + pair / group_;
                const int64_t most =
                    first_seen + std::min(pair + ROWS - 1, pairs - 1) / group_;
                if (most > key && key + count > form_.hidden(least))
                    step(row, tile, key, std::min(count, most - key), least - key, pair);
            }
        }
        finish(out, tile.first, pairs);
    }

  private:
    void start(
        const Row &row, const Pairs &query, int64_t first, int64_t pairs,
        int64_t padded) {
        const int64_t width = pool_.width, numbers = width / Product::STEP;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const Numbers own = query.at(first, pair);
            for (int64_t i = 0; i < numbers; ++i)
                queries_[pair * numbers + i] = Product::query(own, i * Product::STEP);
        }
        std::fill(queries_ + pairs * numbers, queries_ + padded * numbers, Number(0));
        std::fill(sums_ + 0, sums_ + padded * width, 0.0f);
        std::fill(peaks_ + 0, peaks_ + padded, NEVER);
        std::fill(masses_ + 0, masses_ + padded, 0.0f);
        for (int64_t pair = 0; pair < pairs; ++pair)
            form_.start(row.kv_head, pair % group_, peaks_[pair], masses_[pair]);
    }

    // Let ROWS pairs see `count` keys from `first` on, the first pair `seen` of them, and
    // the pairs of each further query one more.
    void step(
        const Row &row_of, const Tile &tile, int64_t first, int64_t count, int64_t seen,
        int64_t pair) {
        const int32_t *const pages = row_of.pages;
        const int64_t size = pool_.page_size, width = pool_.width;
        const Number *queries = queries_ + pair * (width / Product::STEP);
        for (int64_t token = 0; token < count; token += PANEL) {
            const int64_t at = first + token;
            const Page *const keys = pool_.keys(pages[at / size]) + at % size;
            if (pair == 0) // the first to come by
                multiply<true, Product>(
                    queries, keys, ahead(pages, std::min(at + AHEAD, row_of.keys - 1)),
                    width, size, logits_ + token);
            else
                multiply<false, Product, Page>(
                    queries, keys, {}, width, size, logits_ + token);
        }
        const int64_t padded = (count + PANEL - 1) / PANEL * PANEL;
        if (is_scaled<Page>)
            apply_scales(pool_, true, pages, first, padded, ROWS, BLOCK, logits_);
        if (form_.bends())
            bend(row_of, tile, first, padded, pair);
        for (int row = 0; row < ROWS; ++row) {
            const int64_t later = (pair + row) / group_ - pair / group_;
            row_of.gap.hide(logits_ + row * BLOCK, first, count);
            soften(
                logits_ + row * BLOCK, form_.hidden(first + seen + later) - first,
                std::min(count, seen + later), padded, pair + row);
        }
        if (is_scaled<Page>)
            apply_scales(pool_, false, pages, first, count, ROWS, BLOCK, logits_);
        Run<Page> runs[BLOCK / PANEL + 1];
        int64_t used = 0;
        for (int64_t token = 0; token < count; token += runs[used++].count) {
            const int64_t at = first + token, offset = at % size;
            runs[used].values = pool_.values(pages[at / size]) + offset * width;
            runs[used].count = std::min(size - offset, count - token);
        }
        for (int row = 0; row < ROWS; ++row)
            Product::round(logits_ + row * BLOCK, padded);
        const Number *weights = Product::weights(logits_);
        for (int64_t d = 0; d < width; d += PANEL)
            accumulate<Product>(
                weights, runs, used, width, d, sums_ + pair * width + d);
    }

    // Keys and values of the panel that has `token`.
    Ahead<Page> ahead(const int32_t *pages, int64_t token) const {
        const int64_t size = pool_.page_size, page = pages[token / size];
        const int64_t offset = token % size / PANEL * PANEL;
        return {pool_.keys(page) + offset, pool_.values(page) + offset * pool_.width};
    }

    // What a form makes of the logits of ROWS pairs.
    void bend(
        const Row &row, const Tile &tile, int64_t first, int64_t padded, int64_t pair) {
        const int64_t pairs = (tile.last - tile.first) * group_;
        for (int64_t i = 0; i < ROWS && pair + i < pairs; ++i) {
            const int64_t token = row.token + tile.first + (pair + i) / group_;
            const Head head = form_.head(row.kv_head, (pair + i) % group_, token);
            form_.bend(head, pool_, row.pages, first, padded, logits_ + i * BLOCK);
        }
    }

    // Turn a pair's logits, of which it sees those from `hidden` to `seen`, into powers
    // below its new peak, and bring its sums down to it.
    void soften(
        float *logits, int64_t hidden, int64_t seen, int64_t padded, int64_t pair) {
        if (seen < padded)
            std::fill(logits + std::max<int64_t>(seen, 0), logits + padded, NEVER);
        if (hidden > 0)
            std::fill(logits, logits + std::min(hidden, padded), NEVER);
        float &peak = peaks_[pair];
        const float top = std::max(peak, highest(logits, padded) * factor_);
        if (top > peak) {
            const float fade = power_of_two(Floats{} + (peak - top))[0];
            for (int64_t d = 0; d < pool_.width; d += LANES)
                vector_at(sums_ + pair * pool_.width + d) *= fade;
            masses_[pair] *= fade;
            peak = top;
        }
        // A pair that has seen nothing yet: NEVER less NEVER would be no number.
        const float base = top == NEVER ? 0 : top;
        Floats drawn = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats &place = vector_at(logits + i);
            place = power_of_two(place * factor_ - base);
            drawn += place;
        }
        masses_[pair] += total(drawn);
    }

    void finish(const Pairs &out, int64_t first, int64_t pairs) {
        const int64_t width = pool_.width;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const float factor = masses_[pair] > 0 ? 1 / masses_[pair] : 0;
            float *const sums = sums_ + pair * width;
            const Numbers own = out.at(first, pair);
            for (int64_t d = 0; d < width; d += PANEL) {
                const Pair both = {
                    vector_at(sums + d) * factor, vector_at(sums + d + LANES) * factor};
                store(sums + d, Product::ordered(both));
            }
            for (int64_t d = 0; d < width; ++d)
                own.put(d, sums[d]);
        }
    }

    const Pool<Page> pool_;
    const int64_t group_;
    const Form form_;
    const float factor_;
    const int64_t most_;
    Buffer<Number> queries_;
    Buffer<float> sums_, peaks_, masses_, logits_;
};

// Cut a row's queries into tiles of about equal size.
void cut(int64_t row, int64_t count, int64_t group, std::vector<Tile> &tiles) {
    const int64_t most = std::max<int64_t>(MOST_PAIRS / group, 1);
    const int64_t parts = (count + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part)
        tiles.push_back({row, count * part / parts, count * (part + 1) / parts});
}

// Rows of queries; see below.
struct Rows {
    const int32_t *table;
    int64_t table_stride;
    const int64_t *first;
    const int32_t *counts, *lengths, *gaps;
    int64_t rows;
    Numbers query;
    int64_t query_stride, kv_heads, group;
    Form form;
    Numbers out;
};

template <class Page, class Product>
void prefill(const Rows &call, const Pool<Page> &pool, Product) {
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < call.rows; ++row)
        cut(row, call.counts[row], call.group, tiles);
    const int64_t width = pool.width, group = call.group;
    const int64_t out_stride = call.kv_heads * group * width;
#pragma omp parallel
    {
        Attention<Page, Product> attention(pool, group, call.form);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tiles.size(); ++i) {
            const int64_t row = tiles[i].row;
            const int64_t token = call.first[row] / call.kv_heads;
            const int64_t kv_head = call.first[row] % call.kv_heads;
            const int64_t head = kv_head * group * width;
            attention.run(
                {call.counts[row], call.lengths[row],
                 call.table + row * call.table_stride, token, kv_head,
                 Gap::of(call.gaps, row)},
                tiles[i],
                {call.query.from(token * call.query_stride + head), call.query_stride,
                 group, width},
                {call.out.from(token * out_stride + head), out_stride, group, width});
        }
    }
}

} // namespace

// Queries and `out` are [tokens, kv_heads, group, width], bfloat16 or float32, the
// queries' tokens `query_stride` numbers apart. Row r has counts[r] queries, from (token,
// KV head) number first[r] on. Its last query sees lengths[r] keys, and each query before
// it one less. `scores` may be none. `gaps` are none, or a gap of each row, [rows, 2].
extern "C" void prefill_attention(
    const int32_t *table, int64_t table_stride, const int64_t *first,
    const int32_t *counts, const int32_t *lengths, int64_t rows, int64_t kind, void *pool,
    int64_t page_size, int64_t width, int64_t is_half, const void *query,
    int64_t query_stride, int64_t kv_heads, int64_t group, float scale, void *out,
    const Scores *scores, const int32_t *gaps) {
    const Rows call{table, table_stride, first, counts, lengths, gaps, rows,
                    {query, is_half}, query_stride, kv_heads, group,
                    Form(scores, group, scale), {out, is_half}};
    with_products(
        kind, pool, page_size, width, is_half,
        [&](const auto &pages, auto product) { prefill(call, pages, product); });
}
