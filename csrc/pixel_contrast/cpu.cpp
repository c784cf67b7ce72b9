// SPDX-License-Identifier: Apache-2.0
// The pixel-level contrastive loss on the CPU.
//
// Positives are few, so they are found and summed up on their own (near.h); the rest is a log-sum-exp over all
// pairs (all_pairs.h), and only for the pixels that have a positive: where two views overlap by half, half the work.
// Where everything is positive, the sums over the positives take several times as long as those over all pairs.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "all_pairs.h"
#include "near.h"
#include "pixel_contrast.h"

namespace medaccel::pixel_contrast {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

// A log-sum-exp to which scores come one by one.
struct OnlineSum {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    void add(double x) {
        if (x > top) {
            sum = sum * std::exp2(top - x) + 1;
            top = x;
        } else {
            sum += std::exp2(x - top);
        }
    }
    double value() const { return sum == 0 ? top : top + std::log2(sum); }
};

template <class T>
AllPairs<T> all_pairs(const UnitRows<T>& query, const UnitRows<T>& key, const std::vector<std::vector<int64_t>>& rows,
                      const Problem& p) {
    return AllPairs<T>(query, key, rows, p.queries, p.keys, p.channels, p.temperature, -1, p.threads);
}

}  // namespace

template <class T, class U>
void forward(const T* query, const T* key, const U* query_coords, const U* key_coords, const U* radius, T* loss,
             T* lse, T* positive_lse, const Problem& p) {
    const int64_t n = p.batch * p.queries;
    const UnitRows<T> q(query, n, p.channels, p.threads), k(key, p.batch * p.keys, p.channels, p.threads);
    std::vector<OnlineSum> positives(n);
    std::vector<char> valid(n, 0);
    each_pair(samples_of(query_coords, p.batch, p.queries, p.axes), samples_of(key_coords, p.batch, p.keys, p.axes),
              radius, p.threads, p.cull, [&](int64_t b, int64_t i, int64_t j) {
                  const int64_t row = b * p.queries + i;
                  valid[row] = 1;
                  positives[row].add(dot(q.row(row), k.row(b * p.keys + j), q.width) * (kLog2e / p.temperature));
              });
    for (int64_t i = 0; i < n; ++i) {
        loss[i] = lse[i] = 0;
        positive_lse[i] = static_cast<T>(positives[i].value());
    }
    all_pairs(q, k, rows_where(p.batch, p.queries, valid), p).forward([&](int64_t row, double value) {
        lse[row] = static_cast<T>(value);
        const double above = value - positives[row].value();
        loss[row] = static_cast<T>(above < 0 ? 0 : above * kLn2);  // rounding may put the part above the whole
    });
}

template <class T, class U>
void backward(const T* grad, const T* query, const T* key, const U* query_coords, const U* key_coords,
              const U* radius, const T* lse, const T* positive_lse, T* grad_query, T* grad_key, const Problem& p) {
    const int64_t n = p.batch * p.queries;
    const UnitRows<T> q(query, n, p.channels, p.threads), k(key, p.batch * p.keys, p.channels, p.threads);
    std::vector<T> weight(n), query_sums, key_sums;
    std::vector<char> wanted(n);
    for (int64_t i = 0; i < n; ++i) {
        const bool valid = positive_lse[i] != -std::numeric_limits<T>::infinity();
        weight[i] = valid ? static_cast<T>(grad[i] / p.temperature) : T(0);
        wanted[i] = weight[i] != 0;
    }
    if (grad_query) query_sums = q.zeros();
    if (grad_key) key_sums = k.zeros();
    all_pairs(q, k, rows_where(p.batch, p.queries, wanted), p).backward(weight.data(), lse, query_sums, key_sums);

    // A positive's weight within the positives: each is subtracted from its query's gradient, and then from its
    // key's.
    const auto queries = samples_of(query_coords, p.batch, p.queries, p.axes),
               keys = samples_of(key_coords, p.batch, p.keys, p.axes);
    const auto share = [&](int64_t i, int64_t j) {
        // Rounded as positive_lse is: of a large score, at a small temperature, the rounding alone is more than 1.
        const auto score = static_cast<T>(dot(q.row(i), k.row(j), q.width) * (kLog2e / p.temperature));
        return static_cast<T>(-weight[i] * std::exp2(double{score} - positive_lse[i]));
    };
    if (grad_query) {
        each_pair(queries, keys, radius, p.threads, p.cull, [&](int64_t b, int64_t i, int64_t j) {
            const int64_t row = b * p.queries + i, other = b * p.keys + j;
            if (wanted[row]) add_scaled(share(row, other), k.row(other), k.width, query_sums.data() + row * q.width);
        });
        q.gradient(query_sums, grad_query);
    }
    if (grad_key) {
        each_pair(keys, queries, radius, p.threads, p.cull, [&](int64_t b, int64_t j, int64_t i) {
            const int64_t row = b * p.queries + i, other = b * p.keys + j;
            if (wanted[row]) add_scaled(share(row, other), q.row(row), q.width, key_sums.data() + other * k.width);
        });
        k.gradient(key_sums, grad_key);
    }
}

#define MEDACCEL_INSTANTIATE(T, U)                                                                                 \
    template void forward(const T*, const T*, const U*, const U*, const U*, T*, T*, T*, const Problem&);           \
    template void backward(const T*, const T*, const T*, const U*, const U*, const U*, const T*, const T*, T*, T*, \
                           const Problem&);
MEDACCEL_INSTANTIATE(float, float)
MEDACCEL_INSTANTIATE(float, double)
MEDACCEL_INSTANTIATE(double, float)
MEDACCEL_INSTANTIATE(double, double)

}  // namespace medaccel::pixel_contrast
