// SPDX-License-Identifier: Apache-2.0
// Attention of a decode step over head pages on a CPU: one query a row, whose pages are
// read once, at the pace of memory.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gaps.h"
#include "products.h"
#include "scores.h"

namespace {

// Tokens whose softmax is brought up to date together.
constexpr int64_t TOKENS = 96;
// Tokens of which keys are multiplied, and dimensions of which values are added up.
constexpr int64_t PANEL = 2 * LANES;
// Query heads that share what was loaded; more take turns.
constexpr int HEADS = 4;
// A row is cut into no shorter parts than this many tokens.
constexpr int64_t LEAST = 1024;
// Tokens between what is read and what is fetched: pages lie anywhere, so no hardware
// foresees the next.
constexpr int64_t AHEAD = 96;
// Tokens below which waking other threads takes longer than the work.
constexpr int64_t WORTH_THREADS = 1024;

// One part of one row: its heads' sums over some of the row's pages, of whose tokens the
// first `hidden` of the row are not seen, nor those in its gap.
struct Part {
    int64_t row, first, last, hidden;
    Gap gap;
};

int64_t threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Panels that `heads` heads take together: enough sums to keep the units for products
// busy, as many as there are registers for. Pages and heads are a multiple of 32 wide.
template <int heads> constexpr int panels() {
    const int most = 32 / PANEL;
    return heads * most * 2 + 3 < REGISTERS ? most : 1;
}

// Fetch some numbers into the cache, by lines of 64 bytes.
template <int64_t count, class Page> inline void fetch(const Page *numbers) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; i += 64 / sizeof(Page))
        __builtin_prefetch(numbers + i);
}

// Multiply `heads` queries [width / STEP, HEADS] with the keys of some panels of tokens,
// `stride` apart, and fetch the keys that are `ahead`.
template <int heads, class Product, class Page>
void multiply(
    const typename Product::Number *query, const Page *keys, const Page *ahead,
    int64_t width, int64_t stride, float *logits) {
    constexpr int count = panels<heads>();
    Pair sum[count][heads] = {};
    for (int64_t d = 0; d < width; d += Product::STEP) {
#pragma GCC unroll 2
        for (int64_t line = d; line < d + Product::STEP; ++line)
            fetch<count * PANEL>(ahead + line * stride);
#pragma GCC unroll 4
        for (int panel = 0; panel < count; ++panel) {
            const auto key = Product::load(keys + d * stride + panel * PANEL, stride);
#pragma GCC unroll 4
            for (int head = 0; head < heads; ++head)
                Product::add(
                    sum[panel][head], query[d / Product::STEP * HEADS + head], key);
        }
    }
    for (int head = 0; head < heads; ++head)
        for (int panel = 0; panel < count; ++panel)
            store(
                logits + head * TOKENS + panel * PANEL,
                Product::ordered(sum[panel][head]));
}

// Add some panels of dimensions of `count` tokens' values [count, width], weighted, to
// `sums`, and fetch the values that are `ahead`.
template <int heads, class Product, class Page>
void accumulate(
    const typename Product::Number *weights, const Page *values, const Page *ahead,
    int64_t count, int64_t width, float *sums) {
    constexpr int parts = panels<heads>();
    constexpr int64_t STEP = Product::STEP;
    Pair sum[parts][heads];
    for (int head = 0; head < heads; ++head)
        for (int panel = 0; panel < parts; ++panel) {
            float *const own = sums + head * width + panel * PANEL;
            sum[panel][head] = {vector_at(own), vector_at(own + LANES)};
        }
    const auto add = [&](int64_t i, auto load) {
#pragma GCC unroll 4
        for (int panel = 0; panel < parts; ++panel) {
            const auto value = load(values + i * STEP * width + panel * PANEL);
#pragma GCC unroll 4
            for (int head = 0; head < heads; ++head)
                Product::add(sum[panel][head], weights[head * TOKENS + i], value);
        }
    };
    for (int64_t i = 0; i < count / STEP; ++i) {
#pragma GCC unroll 2
        for (int64_t line = i * STEP; line < (i + 1) * STEP; ++line)
            fetch<parts * PANEL>(ahead + line * width);
        add(i, [&](const Page *place) { return Product::load(place, width); });
    }
    if (count % STEP)
        add(count / STEP, [](const Page *place) { return Product::load_one(place); });
    for (int head = 0; head < heads; ++head)
        for (int panel = 0; panel < parts; ++panel)
            store(sums + head * width + panel * PANEL, sum[panel][head]);
}

// The online softmax of one part, for all heads of the row.
template <class Page, class Product> class Attention {
    using Number = typename Product::Number;

  public:
    Attention(const Pool<Page> &pool, int64_t group, const Form &form)
        : pool_(pool), group_(group), quads_((group + HEADS - 1) / HEADS), form_(form),
          factor_(form.factor()), queries_(quads_ * HEADS * pool.width / Product::STEP),
          logits_(HEADS * TOKENS) {}

    // Leave sums [group, width], in the order of `load`, peaks and masses [group].
    void run(
        Numbers query, const int32_t *pages, const Part &part, float *sums, float *peaks,
        float *masses) {
        const int64_t first = part.first, last = part.last;
        row_ = part.row;
        pack(query);
        std::fill(sums, sums + group_ * pool_.width, 0.0f);
        std::fill(peaks, peaks + group_, NEVER);
        std::fill(masses, masses + group_, 0.0f);
        // A row has its sinks once, however many parts it has.
        for (int64_t head = 0; first == 0 && head < group_; ++head)
            form_.start(form_.kv_head(row_), head, peaks[head], masses[head]);
        hidden_ = part.hidden;
        gap_ = part.gap;
        for (int64_t start = std::max(first, hidden_ / TOKENS * TOKENS); start < last;
             start += TOKENS) {
            for (int64_t head = 0; head < group_; head += HEADS) {
                float *const own = sums + head * pool_.width;
                switch (std::min<int64_t>(group_ - head, HEADS)) {
                case 1:
                    step<1>(pages, start, last, head, own, peaks, masses);
                    break;
                case 2:
                    step<2>(pages, start, last, head, own, peaks, masses);
                    break;
                case 3:
                    step<3>(pages, start, last, head, own, peaks, masses);
                    break;
                default:
                    step<HEADS>(pages, start, last, head, own, peaks, masses);
                }
            }
        }
    }

  private:
    void pack(Numbers query) {
        const int64_t numbers = pool_.width / Product::STEP;
        for (int64_t head = 0; head < group_; ++head)
            for (int64_t i = 0; i < numbers; ++i)
                queries_[(head / HEADS * numbers + i) * HEADS + head % HEADS] =
                    Product::query(query, head * pool_.width + i * Product::STEP);
    }

    template <int heads>
    void step(
        const int32_t *pages, int64_t start, int64_t last, int64_t head, float *sums,
        float *peaks, float *masses) {
        const int64_t count = std::min(TOKENS, last - start);
        const int64_t size = pool_.page_size, width = pool_.width;
        const Number *query = queries_ + head * (width / Product::STEP);
        constexpr int64_t together = panels<heads>() * PANEL;
        for (int64_t token = 0; token < count; token += together) {
            const int64_t at = start + token, next = std::min(at + AHEAD, last - 1);
            multiply<heads, Product>(
                query, pool_.keys(pages[at / size]) + at % size,
                pool_.keys(pages[next / size]) + next % size, width, size,
                logits_ + token);
        }
        const int64_t padded = (count + together - 1) / together * together;
        if (is_scaled<Page>)
            apply_scales(pool_, true, pages, start, padded, heads, TOKENS, logits_);
        if (form_.bends())
            bend(heads, head, pages, start, padded);
        for (int i = 0; i < heads; ++i) {
            gap_.hide(logits_ + i * TOKENS, start, count);
            soften(logits_ + i * TOKENS, hidden_ - start, count, padded,
                   sums + i * width, peaks[head + i], masses[head + i]);
        }
        if (is_scaled<Page>)
            apply_scales(pool_, false, pages, start, count, heads, TOKENS, logits_);
        for (int i = 0; i < heads; ++i)
            Product::round(logits_ + i * TOKENS, padded);
        const Number *weights = Product::weights(logits_);
        for (int64_t token = 0; token < count;) {
            const int64_t at = start + token;
            const int64_t run = std::min(size - at % size, count - token);
            const Page *values = pool_.values(pages[at / size]) + at % size * width;
            const int64_t next = std::min(at + AHEAD, last - 1) / size;
            const Page *ahead = pool_.values(pages[next]);
            for (int64_t d = 0; d < width; d += together)
                accumulate<heads, Product>(
                    weights + token / Product::STEP, values + d, ahead + d, run, width,
                    sums + d);
            token += run;
        }
    }

    // What a form makes of the logits of some heads.
    void bend(
        int heads, int64_t head, const int32_t *pages, int64_t start, int64_t padded) {
        for (int i = 0; i < heads; ++i)
            form_.bend(
                form_.head(form_.kv_head(row_), head + i, form_.token(row_)), pool_,
                pages, start, padded, logits_ + i * TOKENS);
    }

    // Turn logits into powers below the new peak, and bring the sums down to it. The first
    // `hidden` are not seen.
    void soften(
        float *logits, int64_t hidden, int64_t count, int64_t padded, float *sums, float &peak,
        float &mass) {
        std::fill(logits + count, logits + padded, NEVER);
        if (hidden > 0)
            std::fill(logits, logits + hidden, NEVER);
        const float top = std::max(peak, highest(logits, padded) * factor_);
        if (top > peak) {
            const float fade = power_of_two(Floats{} + (peak - top))[0];
            for (int64_t d = 0; d < pool_.width; d += LANES)
                vector_at(sums + d) *= fade;
            mass *= fade;
            peak = top;
        }
        // A head whose keys so far all lie in a gap: NEVER less NEVER would be no number.
        const float base = peak == NEVER ? 0 : peak;
        Floats drawn = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            Floats &place = vector_at(logits + i);
            place = power_of_two(place * factor_ - base);
            drawn += place;
        }
        mass += total(drawn);
    }

    const Pool<Page> pool_;
    const int64_t group_, quads_;
    const Form form_;
    const float factor_;
    int64_t row_ = 0, hidden_ = 0;
    Gap gap_{};
    Buffer<Number> queries_;
    Buffer<float> logits_;
};

// What all parts of a call leave behind.
struct Sums {
    Buffer<float> sums, peaks, masses;

    Sums(int64_t parts, int64_t group, int64_t width)
        : sums(parts * group * width), peaks(parts * group), masses(parts * group) {}
};

// Cut rows of `tokens` tokens in all so that threads have about equally much to read.
std::vector<Part> cut(
    const int32_t *lengths, const int32_t *gaps, int64_t rows, int64_t tokens,
    const Form &form) {
    // A few parts for each thread even out what they take.
    const int64_t aim = std::max(LEAST, tokens / (4 * threads()));
    std::vector<Part> parts;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t count = std::max<int64_t>((lengths[row] + aim / 2) / aim, 1);
        const int64_t each = (lengths[row] / count / TOKENS + 1) * TOKENS;
        for (int64_t first = 0; first == 0 || first < lengths[row]; first += each)
            parts.push_back(
                {row, first, std::min<int64_t>(first + each, lengths[row]),
                 form.hidden(lengths[row]), Gap::of(gaps, row)});
    }
    return parts;
}

// Join the parts of one row, and write its heads.
template <class Product>
void join(
    const Sums &found, int64_t first, int64_t last, int64_t group, int64_t width,
    Numbers out) {
    for (int64_t head = 0; head < group; ++head) {
        float peak = NEVER, mass = 0;
        for (int64_t part = first; part < last; ++part)
            peak = std::max(peak, found.peaks[part * group + head]);
        float *const sums = found.sums + (first * group + head) * width;
        for (int64_t part = first; part < last; ++part) {
            const int64_t at = part * group + head;
            const float share = found.masses[at] > 0
                ? power_of_two(Floats{} + (found.peaks[at] - peak))[0] : 0;
            mass += found.masses[at] * share;
            const float *own = found.sums + at * width;
            for (int64_t d = 0; d < width; d += LANES)
                vector_at(sums + d) = part == first
                    ? vector_at(own + d) * share
                    : vector_at(sums + d) + vector_at(own + d) * share;
        }
        const float factor = mass > 0 ? 1 / mass : 0;
        for (int64_t d = 0; d < width; d += PANEL) {
            const Pair both = {
                vector_at(sums + d) * factor, vector_at(sums + d + LANES) * factor};
            store(sums + d, Product::ordered(both));
        }
        for (int64_t d = 0; d < width; ++d)
            out.put(head * width + d, sums[d]);
    }
}

template <class Page, class Product>
void decode(
    const int32_t *table, int64_t stride, const int32_t *lengths, const int32_t *gaps,
    int64_t rows, const Pool<Page> &pool, Product, Numbers query, int64_t group,
    const Form &form, Numbers out) {
    const int64_t width = pool.width;
    const int64_t tokens = std::accumulate(lengths, lengths + rows, int64_t(0));
    const std::vector<Part> parts = cut(lengths, gaps, rows, tokens, form);
    const int64_t count = parts.size();
    const Sums found(count, group, width);
#pragma omp parallel if (tokens > WORTH_THREADS)
    {
        Attention<Page, Product> attention(pool, group, form);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            const Part &part = parts[i];
            attention.run(
                query.from(part.row * group * width), table + part.row * stride, part,
                found.sums + i * group * width, found.peaks + i * group,
                found.masses + i * group);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            if (parts[i].first > 0)
                continue;
            int64_t last = i + 1;
            while (last < count && parts[last].row == parts[i].row)
                ++last;
            const int64_t own = parts[i].row * group * width;
            join<Product>(found, i, last, group, width, out.from(own));
        }
    }
}

} // namespace

// Arrays are contiguous, but for the page table, whose rows are `stride` apart. Queries
// and `out` are bfloat16 or float32. A row without tokens gets zeros. `scores` may be
// none; where they differ by head, rows are (token, KV head) in this order. `gaps` are
// none, or a gap of each row, [rows, 2].
extern "C" void decode_attention(
    const int32_t *table, int64_t stride, const int32_t *lengths, int64_t rows,
    int64_t kind, void *pool, int64_t page_size, int64_t width, int64_t is_half,
    const void *query, int64_t group, float scale, void *out, const Scores *scores,
    const int32_t *gaps) {
    const Form form(scores, group, scale);
    with_products(
        kind, pool, page_size, width, is_half, [&](const auto &pages, auto product) {
            decode(table, stride, lengths, gaps, rows, pages, product, {query, is_half},
                   group, form, {out, is_half});
        });
}
