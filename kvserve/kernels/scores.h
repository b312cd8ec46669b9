// SPDX-License-Identifier: Apache-2.0
// How a model makes logits, and weights, of products of queries and keys, where it is not
// by a scale and a softmax alone: `score_form.py` says what a model may ask for.
//
// Kernels compute in base 2. Where a form bends logits, `bend` leaves them scaled and in
// base 2; where it does not, kernels multiply a factor in as they always do.

#pragma once

#include <cstdint>

#include "pages.h"

namespace {

// As `native_scores.py` lays it out. Arrays of heads are [kv_heads * group].
struct Scores {
    float soft_cap; // 0: none
    int64_t kv_heads;
    const float *sinks;       // none, or a logit of each query head
    const float *slopes;      // none, or the weight that each head gives to distance
    const int32_t *positions; // of cached tokens, [num_pages, page_size]
    const int32_t *own;       // of the tokens that ask
    int64_t window;           // keys of a row that a query sees, its own last; 0: all
};

// What a form makes of a head's logits.
struct Head {
    float cap, slope; // 0: none
    int32_t own;      // where the query stands
};

inline Floats bent(Floats logits, float scale, Head head) {
    if (head.cap > 0) {
        // tanh of a size is (1 - t) / (1 + t), where t = exp(-2 size).
        const Floats x = logits * (scale / head.cap);
        const Floats t = power_of_two(higher(x, -x) * (-2 * LOG2_E));
        const Floats size = (1 - t) / (1 + t) * (head.cap * LOG2_E);
        return x < 0 ? -size : size;
    }
    return logits * (scale * LOG2_E);
}

// How far LANES tokens stand behind a query, in numbers that are not positive.
inline Floats distances(const int32_t *positions, int32_t own) {
    Ints held;
    std::memcpy(&held, positions, sizeof held);
    return __builtin_convertvector(held - own, Floats);
}

// A form, as one call of a kernel needs it; none costs a branch a block.
class Form {
  public:
    Form(const Scores *scores, int64_t group, float scale)
        : scores_(scores), group_(group), scale_(scale) {}

    bool bends() const {
        return scores_ && (scores_->soft_cap > 0 || scores_->slopes);
    }
    // Of the `seen` first keys of a row, its own the last, those that a query does not see.
    int64_t hidden(int64_t seen) const {
        const int64_t window = scores_ ? scores_->window : 0;
        return window > 0 && seen > window ? seen - window : 0;
    }
    // What is left to multiply logits with.
    float factor() const { return bends() ? 1 : scale_ * LOG2_E; }

    // The KV head, and the token, of row (token, KV head) `row`.
    int64_t kv_head(int64_t row) const { return scores_ ? row % scores_->kv_heads : 0; }
    int64_t token(int64_t row) const { return scores_ ? row / scores_->kv_heads : 0; }

    // What a head's softmax has before any key: a peak and its mass.
    void start(int64_t kv_head, int64_t head, float &peak, float &mass) const {
        peak = scores_ && scores_->sinks
            ? scores_->sinks[kv_head * group_ + head] * LOG2_E : NEVER;
        mass = peak > NEVER;
    }

    Head head(int64_t kv_head, int64_t head, int64_t token) const {
        const float *slopes = scores_->slopes;
        return {scores_->soft_cap, slopes ? slopes[kv_head * group_ + head] * LOG2_E : 0,
                slopes && scores_->own ? scores_->own[token] : 0};
    }

    // Bend logits of cached tokens from `first` of a row on, a multiple of LANES.
    template <class Page>
    __attribute__((noinline)) void bend(
        Head head, const Pool<Page> &pool, const int32_t *pages, int64_t first,
        int64_t count, float *logits) const {
        const int64_t size = pool.page_size;
        for (int64_t i = 0; i < count; i += LANES) {
            Floats &place = vector_at(logits + i);
            place = bent(place, scale_, head);
            if (head.slope != 0) {
                const int64_t at = first + i, slot = pages[at / size] * size + at % size;
                place += head.slope * distances(scores_->positions + slot, head.own);
            }
        }
    }

    // Bend logits of tokens that stand one behind the other, the first at `position`.
    __attribute__((noinline)) void bend_in_order(
        Head head, int64_t position, int64_t count, float *logits) const {
        static constexpr Lanes IN_ORDER([](int lane) { return lane; });
        const Floats NUMBERS = __builtin_convertvector(Ints(IN_ORDER), Floats);
        for (int64_t i = 0; i < count; i += LANES) {
            Floats &place = vector_at(logits + i);
            place = bent(place, scale_, head);
            if (head.slope != 0)
                place += head.slope * (float(position + i - head.own) + NUMBERS);
        }
    }

  private:
    const Scores *const scores_;
    const int64_t group_;
    const float scale_;
};

} // namespace
