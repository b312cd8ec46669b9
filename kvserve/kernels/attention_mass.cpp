// SPDX-License-Identifier: Apache-2.0
// Attention that keys receive, summed over queries: statistics.attention_mass on a CPU.
//
// The queries of a KV head are cut into tiles, and the keys into blocks. A tile
// exponentiates each block against the block's own maximum as soon as its logits are
// there, keeps all of it in the cache of its core, and adds up columns once every row's
// sum is known. Sums are float32 throughout, in an order that depends on the number of
// threads alone.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "scores.h"

namespace {

// ROWS x COLUMNS vectors of sums fill the registers; a panel of keys is COLUMNS wide.
constexpr int ROWS = 6, COLUMNS = REGISTERS / 8, PANEL = COLUMNS * LANES;
// A block of packed keys and ROWS rows of its logits stay in the first-level cache.
constexpr int64_t BLOCK = 256, PANELS = BLOCK / PANEL;
// Floats of a tile's weights: half of a small second-level cache.
constexpr int64_t TILE_FLOATS = 1 << 17;

// A word holds what one step of a dot product takes from a vector: a float, or, where
// the machine multiplies them, two bfloat16, whose products are exact in float32.
template <class Word> struct Step;

template <> struct Step<float> {
    static constexpr int NUMBERS = 1;

    template <class Number> static float word(const Number *numbers) {
        return to_float(*numbers);
    }

    static Floats add(Floats sum, float query, const float *keys) {
        return sum + query * vector_at(keys);
    }
};

#if defined(__AVX512BF16__)
template <> struct Step<uint32_t> {
    static constexpr int NUMBERS = 2;

    static uint32_t word(const uint16_t *numbers) {
        return numbers[0] | uint32_t(numbers[1]) << 16;
    }

    static Floats add(Floats sum, uint32_t query, const uint32_t *keys) {
        return (Floats)_mm512_dpbf16_ps(
            (__m512)sum,
            (__m512bh)_mm512_set1_epi32(query),
            (__m512bh)_mm512_load_si512(keys));
    }
};
#endif

// Logits of ROWS queries and PANEL keys, times a factor: rows of `out` are BLOCK apart.
template <class Word>
inline void multiply(
    const Word *queries, const Word *keys, int64_t steps, float factor, float *out) {
    Floats sum[ROWS][COLUMNS] = {};
    for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
            for (int column = 0; column < COLUMNS; ++column)
                sum[row][column] = Step<Word>::add(
                    sum[row][column], queries[step * ROWS + row],
                    keys + step * PANEL + column * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column)
            vector_at(out + row * BLOCK + column * LANES) = sum[row][column] * factor;
}

struct Shape {
    int64_t group, queries, keys, width;

    int64_t rows() const { return group * queries; }
    int64_t blocks() const { return (keys + BLOCK - 1) / BLOCK; }
    // A row is a query of a head; heads of a token are neighbours, so that the rows of
    // a tile see almost the same keys.
    int64_t seen(int64_t row) const { return keys - queries + row / group + 1; }
    int64_t groups_of_tile() const {
        const int64_t fit = TILE_FLOATS / (blocks() * BLOCK * ROWS);
        return std::clamp<int64_t>(fit, 2, 16);
    }
};

// Lay a block of keys out as [PANELS][steps][PANEL] words, zeros beyond the last key.
template <class Word, class Number>
void pack_keys(const Shape &shape, const Number *keys, int64_t block, Word *out) {
    const int64_t steps = shape.width / Step<Word>::NUMBERS;
    for (int64_t panel = 0; panel < PANELS; ++panel)
        for (int64_t lane = 0; lane < PANEL; ++lane) {
            const int64_t key = block * BLOCK + panel * PANEL + lane;
            Word *words = out + panel * steps * PANEL + lane;
            for (int64_t step = 0; step < steps; ++step)
                words[step * PANEL] =
                    key < shape.keys
                        ? Step<Word>::word(
                              keys + key * shape.width + step * Step<Word>::NUMBERS)
                        : Word{};
        }
}

// One tile of queries at a time, with room for the weights of all its rows.
template <class Word, class Number> class Tile {
  public:
    Tile(const Shape &shape, const Form &form)
        : shape_(shape), form_(form), factor_(form.factor()), steps_(shape.width / Step<Word>::NUMBERS),
          groups_(shape.groups_of_tile()), rows_(groups_ * ROWS),
          queries_(rows_ * steps_), weights_(shape.blocks() * rows_ * BLOCK),
          tops_(shape.blocks() * rows_), totals_(shape.blocks() * rows_) {}

    // Add what a KV head's rows from `first` on attend to, to the mass of each key.
    void run(
        const Number *queries, const Word *keys, int64_t kv_head, int64_t first,
        float *mass) {
        kv_head_ = kv_head;
        const int64_t last = std::min(first + rows_, shape_.rows()) - 1;
        pack_queries(queries, first);
        const int64_t blocks = (shape_.seen(last) + BLOCK - 1) / BLOCK;
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t group = 0; group < groups_; ++group)
                weigh(keys, block, group, first);
        normalise(first, blocks, last - first + 1);
        for (int64_t block = 0; block < blocks; ++block)
            add_columns(block, mass + block * BLOCK);
    }

  private:
    void pack_queries(const Number *queries, int64_t first) {
        for (int64_t i = 0; i < rows_; ++i) {
            const int64_t row = std::min(first + i, shape_.rows() - 1);
            const int64_t token = row / shape_.group, head = row % shape_.group;
            const Number *query =
                queries + (head * shape_.queries + token) * shape_.width;
            Word *words = queries_ + i / ROWS * steps_ * ROWS + i % ROWS;
            for (int64_t step = 0; step < steps_; ++step)
                words[step * ROWS] =
                    Step<Word>::word(query + step * Step<Word>::NUMBERS);
        }
    }

    // How many keys of a block a row of the tile sees, or more, or less than none.
    int64_t seen(int64_t row, int64_t block) const {
        return shape_.seen(std::min(row, shape_.rows() - 1)) - block * BLOCK;
    }

    void weigh(const Word *keys, int64_t block, int64_t group, int64_t first) {
        const int64_t place = block * rows_ + group * ROWS, row = first + group * ROWS;
        const int64_t visible = std::min(seen(row + ROWS - 1, block), BLOCK);
        float *weights = weights_ + place * BLOCK;
        const Word *own = queries_ + group * ROWS * steps_;
        for (int64_t panel = 0; panel * PANEL < visible; ++panel)
            multiply(
                own, keys + (block * PANELS + panel) * steps_ * PANEL, steps_,
                factor_, weights + panel * PANEL);
        if (form_.bends())
            for (int64_t i = 0; i < ROWS; ++i)
                bend(row + i, block, visible, weights + i * BLOCK);
        for (int64_t i = 0; i < ROWS; ++i)
            tops_[place + i] = exponentiate(
                weights + i * BLOCK, seen(row + i, block), BLOCK, totals_[place + i]);
    }

    // What a form makes of a row's logits of a block.
    void bend(int64_t row, int64_t block, int64_t visible, float *logits) {
        Head head = form_.head(kv_head_, row % shape_.group, 0);
        head.own = seen(row, 0) - 1;
        const int64_t count = (visible + LANES - 1) / LANES * LANES;
        form_.bend_in_order(head, block * BLOCK, count, logits);
    }

    // Turn the maximum of each row's block into what its powers are to be multiplied
    // with; rows that only fill the tile up count nothing.
    void normalise(int64_t first, int64_t blocks, int64_t rows) {
        for (int64_t row = 0; row < rows_; ++row) {
            float sink, total;
            form_.start(kv_head_, (first + row) % shape_.group, sink, total);
            float top = sink;
            for (int64_t block = 0; block < blocks; ++block)
                top = std::max(top, tops_[block * rows_ + row]);
            if (total > 0)
                total = std::exp2(sink - top);
            for (int64_t block = 0; block < blocks; ++block) {
                float &share = tops_[block * rows_ + row];
                share = std::exp2(share - top);
                total += share * totals_[block * rows_ + row];
            }
            for (int64_t block = 0; block < blocks; ++block)
                tops_[block * rows_ + row] *= row < rows ? 1 / total : 0;
        }
    }

    void add_columns(int64_t block, float *mass) {
        constexpr int AT_ONCE = 4;
        for (int64_t column = 0; column < BLOCK; column += AT_ONCE * LANES) {
            Floats sum[AT_ONCE] = {};
            for (int64_t row = block * rows_; row < (block + 1) * rows_; ++row)
#pragma GCC unroll 8
                for (int i = 0; i < AT_ONCE; ++i)
                    sum[i] += tops_[row] * vector_at(
                        weights_ + row * BLOCK + column + i * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; ++i)
                vector_at(mass + column + i * LANES) += sum[i];
        }
    }

    const Shape shape_;
    const Form form_;
    const float factor_;
    int64_t kv_head_ = 0;
    const int64_t steps_, groups_, rows_;
    Buffer<Word> queries_;
    Buffer<float> weights_, tops_, totals_;
};

template <class Word, class Number>
void sum_columns(
    const Shape &shape, int64_t kv_heads, const Number *query, const Number *key,
    const Form &form, float *mass) {
    const int64_t width = shape.blocks() * BLOCK;
    const int64_t steps = shape.width / Step<Word>::NUMBERS;
    const int64_t tile_rows = shape.groups_of_tile() * ROWS;
    const int threads = omp_get_max_threads();
    Buffer<Word> packed(width * steps);
    Buffer<float> parts(threads * width);
#pragma omp parallel num_threads(threads)
    {
        const int team = omp_get_num_threads();
        float *own = parts + omp_get_thread_num() * width;
        Tile<Word, Number> tile(shape, form);
        for (int64_t head = 0; head < kv_heads; ++head) {
            const Number *keys = key + head * shape.keys * shape.width;
            const Number *queries = query + head * shape.rows() * shape.width;
            std::fill(own, own + width, 0.0f);
#pragma omp for schedule(static, 1)
            for (int64_t block = 0; block < shape.blocks(); ++block)
                pack_keys(shape, keys, block, packed + block * BLOCK * steps);
#pragma omp for schedule(static, 1)
            for (int64_t first = 0; first < shape.rows(); first += tile_rows)
                tile.run(queries, packed, head, first, own);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < shape.keys; ++i) {
                float sum = 0;
                for (int thread = 0; thread < team; ++thread)
                    sum += parts[thread * width + i];
                mass[head * shape.keys + i] = sum;
            }
        }
    }
}

} // namespace

// query [kv_heads * group, queries, width], key [kv_heads, keys, width], both
// contiguous, and mass [kv_heads, keys]; queries are those of the last keys. The width
// is even. `scores` may be none; keys stand where they lie.
extern "C" void attention_mass_float32(
    const float *query, const float *key, float *mass, int64_t kv_heads, int64_t group,
    int64_t queries, int64_t keys, int64_t width, float scale,
    const Scores *scores) {
    const Shape shape{group, queries, keys, width};
    const Form form(scores, group, scale);
    sum_columns<float>(shape, kv_heads, query, key, form, mass);
}

extern "C" void attention_mass_bfloat16(
    const uint16_t *query, const uint16_t *key, float *mass, int64_t kv_heads,
    int64_t group, int64_t queries, int64_t keys, int64_t width, float scale,
    const Scores *scores) {
    const Shape shape{group, queries, keys, width};
    const Form form(scores, group, scale);
#if defined(__AVX512BF16__)
    sum_columns<uint32_t>(shape, kv_heads, query, key, form, mass);
#else
    sum_columns<float>(shape, kv_heads, query, key, form, mass);
#endif
}
