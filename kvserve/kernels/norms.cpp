// SPDX-License-Identifier: Apache-2.0
// Root-mean-square norms of rows, rounded exactly where PyTorch's operators round.

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

// Rows below which waking other threads takes longer than the work.
constexpr int64_t WORTH_THREADS = 64;

inline void put(float number, float *place) { *place = number; }
inline void put(float number, uint16_t *place) { *place = rounded(number); }

// `residual` may be null; else it is added first and gets the sum.
template <class Number>
void normalise(
    const Number *x, Number *residual, const Number *weight, Number *out, int64_t rows,
    int64_t width, float epsilon) {
#pragma omp parallel if (rows > WORTH_THREADS)
    {
        Buffer<float> sum(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t start = row * width;
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t d = 0; d < width; ++d) {
                float number = to_float(x[start + d]);
                if (residual != nullptr) {
                    number += to_float(residual[start + d]);
                    put(number, residual + start + d);
                }
                sum[d] = number;
                squares += number * number;
            }
            const float scale = 1 / std::sqrt(squares / float(width) + epsilon);
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) {
                Number scaled;
                put(sum[d] * scale, &scaled);
                put(to_float(scaled) * to_float(weight[d]), out + start + d);
            }
        }
    }
}

} // namespace

extern "C" {

void rms_norm_float32(
    const float *x, float *residual, const float *weight, float *out, int64_t rows,
    int64_t width, float epsilon) {
    normalise(x, residual, weight, out, rows, width, epsilon);
}

void rms_norm_bfloat16(
    const uint16_t *x, uint16_t *residual, const uint16_t *weight, uint16_t *out,
    int64_t rows, int64_t width, float epsilon) {
    normalise(x, residual, weight, out, rows, width, epsilon);
}

} // extern "C"
