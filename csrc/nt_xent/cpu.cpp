// SPDX-License-Identifier: Apache-2.0
// The log-sum-exps of NT-Xent and InfoNCE on the CPU: those of the pixel contrast, with every query wanted.
#include "nt_xent.h"

#include <vector>

#include "../pixel_contrast/all_pairs.h"

namespace medaccel::nt_xent {
namespace {

using pixel_contrast::AllPairs;
using pixel_contrast::rows_where;
using pixel_contrast::UnitRows;

template <class T>
AllPairs<T> all_pairs(const UnitRows<T>& query, const UnitRows<T>& key, const std::vector<std::vector<int64_t>>& rows,
                      const Problem& p) {
    return AllPairs<T>(query, key, rows, p.queries, p.keys, p.channels, p.temperature, p.self, p.threads);
}

}  // namespace

template <class T>
void forward(const T* query, const T* key, T* lse, const Problem& p) {
    const int64_t n = p.batch * p.queries;
    const UnitRows<T> q(query, n, p.channels, p.threads), k(key, p.batch * p.keys, p.channels, p.threads);
    const auto rows = rows_where(p.batch, p.queries, std::vector<char>(n, 1));
    all_pairs(q, k, rows, p).forward([&](int64_t row, double value) { lse[row] = static_cast<T>(value); });
}

template <class T>
void backward(const T* grad, const T* query, const T* key, const T* lse, T* grad_query, T* grad_key,
              const Problem& p) {
    const int64_t n = p.batch * p.queries;
    const UnitRows<T> q(query, n, p.channels, p.threads), k(key, p.batch * p.keys, p.channels, p.threads);
    std::vector<T> weight(n), query_sums, key_sums;
    std::vector<char> wanted(n);
    for (int64_t i = 0; i < n; ++i) {
        weight[i] = static_cast<T>(grad[i] / p.temperature);
        wanted[i] = weight[i] != 0;
    }
    if (grad_query) query_sums = q.zeros();
    if (grad_key) key_sums = k.zeros();
    all_pairs(q, k, rows_where(p.batch, p.queries, wanted), p).backward(weight.data(), lse, query_sums, key_sums);
    if (grad_query) q.gradient(query_sums, grad_query);
    if (grad_key) k.gradient(key_sums, grad_key);
}

#define MEDACCEL_INSTANTIATE(T)                                    \
    template void forward(const T*, const T*, T*, const Problem&); \
    template void backward(const T*, const T*, const T*, const T*, T*, T*, const Problem&);
MEDACCEL_INSTANTIATE(float)
MEDACCEL_INSTANTIATE(double)

}  // namespace medaccel::nt_xent
