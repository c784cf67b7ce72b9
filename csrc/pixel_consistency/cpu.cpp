// SPDX-License-Identifier: Apache-2.0
// The cosines of near pairs on the CPU. Each sum is owned by one pixel: its pairs come in order, from one thread.
#include "pixel_consistency.h"

#include <vector>

#include "../pixel_contrast/near.h"
#include "../pixel_contrast/unit_rows.h"

namespace medaccel::pixel_consistency {

using pixel_contrast::add_scaled;
using pixel_contrast::dot;
using pixel_contrast::each_pair;
using pixel_contrast::samples_of;
using pixel_contrast::UnitRows;

template <class T, class U>
void forward(const T* query, const T* key, const U* query_coords, const U* key_coords, const U* radius, T* sums,
             T* counts, const Problem& p) {
    const int64_t n = p.batch * p.queries;
    const UnitRows<T> q(query, n, p.channels, p.threads), k(key, p.batch * p.keys, p.channels, p.threads);
    std::vector<double> sum(n, 0.0), count(n, 0.0);
    each_pair(samples_of(query_coords, p.batch, p.queries, p.axes), samples_of(key_coords, p.batch, p.keys, p.axes),
              radius, p.threads, true, [&](int64_t b, int64_t i, int64_t j) {
                  const int64_t row = b * p.queries + i;
                  sum[row] += dot(q.row(row), k.row(b * p.keys + j), q.width);
                  count[row] += 1;
              });
    for (int64_t i = 0; i < n; ++i) sums[i] = static_cast<T>(sum[i]), counts[i] = static_cast<T>(count[i]);
}

template <class T, class U>
void backward(const T* grad, const T* query, const T* key, const U* query_coords, const U* key_coords,
              const U* radius, T* grad_query, T* grad_key, const Problem& p) {
    const int64_t n = p.batch * p.queries;
    const UnitRows<T> q(query, n, p.channels, p.threads), k(key, p.batch * p.keys, p.channels, p.threads);
    const auto queries = samples_of(query_coords, p.batch, p.queries, p.axes);
    const auto keys = samples_of(key_coords, p.batch, p.keys, p.axes);
    if (grad_query) {
        std::vector<T> sums = q.zeros();
        each_pair(queries, keys, radius, p.threads, true, [&](int64_t b, int64_t i, int64_t j) {
            const int64_t row = b * p.queries + i;
            add_scaled(grad[row], k.row(b * p.keys + j), k.width, sums.data() + row * q.width);
        });
        q.gradient(sums, grad_query);
    }
    if (grad_key) {
        std::vector<T> sums = k.zeros();
        each_pair(keys, queries, radius, p.threads, true, [&](int64_t b, int64_t j, int64_t i) {
            const int64_t row = b * p.queries + i;
            add_scaled(grad[row], q.row(row), q.width, sums.data() + (b * p.keys + j) * k.width);
        });
        k.gradient(sums, grad_key);
    }
}

#define MEDACCEL_INSTANTIATE(T, U)                                                                   \
    template void forward(const T*, const T*, const U*, const U*, const U*, T*, T*, const Problem&); \
    template void backward(const T*, const T*, const T*, const U*, const U*, const U*, T*, T*, const Problem&);
MEDACCEL_INSTANTIATE(float, float)
MEDACCEL_INSTANTIATE(float, double)
MEDACCEL_INSTANTIATE(double, float)
MEDACCEL_INSTANTIATE(double, double)

}  // namespace medaccel::pixel_consistency
