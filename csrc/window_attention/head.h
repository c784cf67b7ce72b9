// SPDX-License-Identifier: Apache-2.0
// One head of one window: forward and backward over tokens that have been gathered from the map.
//
// Scores are in base 2: q comes multiplied by scale · log2(e), biases by log2(e). Nothing of the size of the score
// matrix is stored but its block of biases (and of their gradients), which windows of one kind share.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../common/exp2.h"
#include "../common/philox.h"
#include "geometry.h"
#include "tiles.h"

namespace medaccel::window_attention {

constexpr double kLog2e = 1.4426950408889634074;

// The weights that dropout keeps, for one head of one window.
struct Dropout {
    uint64_t seed;
    uint32_t threshold, head, sample;  // head: window · heads + head
    double p;

    // mask[n][kLanes] for keys first … first + n-1: 1 / (1 − p) or 0. first is a multiple of 4.
    template <class T>
    void fill(int first, int n, const int32_t* queries, int lanes, T* mask) const {
        const T keep = static_cast<T>(1 / (1 - p));
        for (int k = 0; k < n; k += 4)
            for (int i = 0; i < kLanes<T>; ++i) {
                const auto query = static_cast<uint32_t>(i < lanes ? queries[i] : 0);
                const auto words =
                    philox::random_words(seed, static_cast<uint32_t>(first + k) / 4, query, head, sample);
                for (int j = 0; j < 4 && k + j < n; ++j)
                    mask[(k + j) * kLanes<T> + i] = words.w[j] < threshold ? T(0) : keep;
            }
    }
};

// Keys are handled in tiles of equal size, a multiple of four keys.
inline int tile_keys(int n) {
    const int tiles = (n + kKeys - 1) / kKeys;
    return ((n + tiles - 1) / tiles + 3) / 4 * 4;
}

template <class T>
struct Tiles {
    alignas(64) T scores[kKeys * kLanes<T>];
    alignas(64) T slopes[kKeys * kLanes<T>];
    alignas(64) T mask[kKeys * kLanes<T>];
    alignas(64) T row[kLanes<T>];
    std::vector<T> columns;               // [d][kLanes]
    std::vector<T> key_sums, value_sums;  // [keys][RowLayout::width()]
};

// Scores of K keys become weights, relative to the row's maximum; their sum grows by them.
template <class T, int K>
inline void weigh(T* scores, const Vec<T> (&top)[2], Vec<T> (&sum)[2]) {
    constexpr int W = Vec<T>::width;
    Vec<T> x[2 * K];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * K; ++i) x[i] = Vec<T>::load(scores + i * W) - top[i % 2];
    simd::exp2(x);
#pragma GCC unroll 4
    for (int i = 0; i < 2 * K; ++i) {
        sum[i % 2] = sum[i % 2] + x[i];
        x[i].store(scores + i * W);
    }
}

// Softmax(queriesᵀ · keys + bias) · values for one segment.
//   d: channels, a multiple of 4          queries: [d][lanes]
//   keys, values: [segment's keys][d]     bias: [segment's keys][lanes]
//   emit(first, columns, row): the outputs of queries first … first + kLanes-1 as columns [d][kLanes], yet to be
//   divided by the sums in row[kLanes]; lse: base-2 log-sum-exp of the same queries, [kLanes]
template <class T, class Emit>
void attend(const Segment& segment, int d, const T* queries, const T* keys, const T* values, const T* bias,
            const Dropout* dropout, Tiles<T>& tiles, const Emit& emit) {
    constexpr int L = kLanes<T>, W = Vec<T>::width;
    const int n = static_cast<int>(segment.keys.size());
    const int step = tile_keys(n);
    const int64_t lanes = segment.lanes;
    tiles.columns.resize(static_cast<size_t>(d) * L);
    for (int64_t q0 = 0; q0 < lanes; q0 += L) {
        const int count = static_cast<int>(std::min<int64_t>(L, static_cast<int64_t>(segment.queries.size()) - q0));
        Vec<T> top[2], sum[2];
        for (int v = 0; v < 2; ++v) {
            top[v] = Vec<T>::all(-std::numeric_limits<T>::infinity());
            sum[v] = Vec<T>::zero();
        }
        std::fill(tiles.columns.begin(), tiles.columns.end(), T(0));
        for (int k0 = 0; k0 < n; k0 += step) {
            const int nk = std::min(step, n - k0);
            Vec<T> new_top[2] = {top[0], top[1]};
            product_into_tile(nk, d, keys + k0 * d, queries + q0, lanes, bias + k0 * lanes + q0, lanes, tiles.scores,
                              new_top);
            if (k0 > 0) {
                for (int v = 0; v < 2; ++v) {
                    const Vec<T> shrink = simd::exp2(top[v] - new_top[v]);
                    sum[v] = sum[v] * shrink;
                    for (int c = 0; c < d; ++c) {
                        T* p = tiles.columns.data() + c * L + v * W;
                        (Vec<T>::load(p) * shrink).store(p);
                    }
                }
            }
            for (int v = 0; v < 2; ++v) top[v] = new_top[v];
            int k = 0;
            for (; k + 2 <= nk; k += 2) weigh<T, 2>(tiles.scores + k * L, top, sum);
            if (k < nk) weigh<T, 1>(tiles.scores + k * L, top, sum);
            if (dropout) {
                dropout->fill(k0, nk, segment.queries.data() + q0, count, tiles.mask);
                for (int i = 0; i < nk * L; i += W)
                    (Vec<T>::load(tiles.scores + i) * Vec<T>::load(tiles.mask + i)).store(tiles.scores + i);
            }
            add_columns(nk, d, values + k0 * d, tiles.scores, tiles.columns.data());
        }
        alignas(64) T lse[L];
        for (int v = 0; v < 2; ++v) sum[v].store(tiles.row + v * W), top[v].store(lse + v * W);
        for (int i = 0; i < count; ++i) lse[i] += std::log2(tiles.row[i]);
        emit(q0, count, tiles.columns.data(), tiles.row, lse);
    }
}

// Scores of K keys become weights, and slopes[key] the gradients of their scores, which bias_grad grows by.
template <class T, int K>
inline void slope_rows(int key, const Vec<T> (&log_sum)[2], Tiles<T>& tiles, T* bias_grad, int64_t lanes) {
    constexpr int W = Vec<T>::width;
    T *scores = tiles.scores + key * kLanes<T>, *slopes = tiles.slopes + key * kLanes<T>;
    Vec<T> x[2 * K];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * K; ++i) x[i] = Vec<T>::load(scores + i * W) - log_sum[i % 2];
    simd::exp2(x);
#pragma GCC unroll 4
    for (int i = 0; i < 2 * K; ++i) {
        x[i].store(scores + i * W);
        const Vec<T> slope = x[i] * Vec<T>::load(slopes + i * W);
        slope.store(slopes + i * W);
        T* sum = bias_grad + i / 2 * lanes + i % 2 * W;
        (Vec<T>::load(sum) + slope).store(sum);
    }
}

// The gradients of one segment, its scores recomputed from lse (base 2).
//   grads: the output's gradient, [d][lanes], 0 in the lanes beyond the queries; delta: Σ_c output · grads, [lanes]
//   q_rows, grad_rows: q (multiplied by scale) and the output's gradient once more, as rows in `layout`
//   bias_grad: [segment's keys][lanes], added to
//   emit(first, count, columns): the gradients of those queries, yet to be multiplied by scale, [d][kLanes]
// Leaves those of keys and values in tiles.key_sums and tiles.value_sums.
template <class T, class Emit>
void attend_backward(const Segment& segment, int d, const RowLayout<T>& layout, const T* queries, const T* keys,
                     const T* values, const T* bias, const T* grads, const T* q_rows, const T* grad_rows,
                     const T* lse, const T* delta, const Dropout* dropout, T* bias_grad, Tiles<T>& tiles,
                     const Emit& emit) {
    constexpr int L = kLanes<T>, W = Vec<T>::width;
    const int n = static_cast<int>(segment.keys.size());
    const int step = tile_keys(n), width = layout.width();
    const int64_t lanes = segment.lanes;
    tiles.columns.resize(static_cast<size_t>(d) * L);
    tiles.key_sums.assign(static_cast<size_t>(n) * width, T(0));
    tiles.value_sums.assign(static_cast<size_t>(n) * width, T(0));
    for (int64_t q0 = 0; q0 < lanes; q0 += L) {
        const int count = static_cast<int>(std::min<int64_t>(L, static_cast<int64_t>(segment.queries.size()) - q0));
        const int64_t first_row = q0 / layout.group * width;
        std::fill(tiles.columns.begin(), tiles.columns.end(), T(0));
        Vec<T> log_sum[2], minus_delta[2];
        for (int v = 0; v < 2; ++v) {
            log_sum[v] = Vec<T>::load(lse + q0 + v * W);
            minus_delta[v] = Vec<T>::zero() - Vec<T>::load(delta + q0 + v * W);
            (dropout ? Vec<T>::zero() : minus_delta[v]).store(tiles.row + v * W);
        }
        for (int k0 = 0; k0 < n; k0 += step) {
            const int nk = std::min(step, n - k0);
            product_into_tile(nk, d, keys + k0 * d, queries + q0, lanes, bias + k0 * lanes + q0, lanes, tiles.scores);
            product_into_tile(nk, d, values + k0 * d, grads + q0, lanes, tiles.row, 0, tiles.slopes);
            if (dropout) dropout->fill(k0, nk, segment.queries.data() + q0, count, tiles.mask);
            if (dropout) {
                for (int at = 0; at < nk * L; at += W) {
                    const Vec<T> mask = Vec<T>::load(tiles.mask + at), slope = Vec<T>::load(tiles.slopes + at);
                    fma(slope, mask, minus_delta[at / W % 2]).store(tiles.slopes + at);
                }
            }
            int k = 0;
            for (; k + 2 <= nk; k += 2) slope_rows<T, 2>(k, log_sum, tiles, bias_grad + (k0 + k) * lanes + q0, lanes);
            if (k < nk) slope_rows<T, 1>(k, log_sum, tiles, bias_grad + (k0 + k) * lanes + q0, lanes);
            if (dropout) {
                for (int at = 0; at < nk * L; at += W)
                    (Vec<T>::load(tiles.scores + at) * Vec<T>::load(tiles.mask + at)).store(tiles.scores + at);
            }
            add_columns(nk, d, keys + k0 * d, tiles.slopes, tiles.columns.data());
            add_rows(nk, layout, tiles.scores, grad_rows + first_row, tiles.value_sums.data() + k0 * width);
            add_rows(nk, layout, tiles.slopes, q_rows + first_row, tiles.key_sums.data() + k0 * width);
        }
        emit(q0, count, tiles.columns.data());
    }
}

}  // namespace medaccel::window_attention
