// SPDX-License-Identifier: Apache-2.0
// The three matrix products between a tile of queries and a tile of keys, one row of channels each.
//
// Queries lie across a register's lanes, so that an exponential's sum needs no sum across lanes:
//
//   tile[key][query]    = Σ_c keys[key][c] · columns[c][query]                   scores
//   sums[c][query]     += Σ_key keys[key][c] · tile[key][query]                  add_to_queries
//   sums[key][c]       += Σ_query tile[key][query] · rows[query][c]              add_to_keys
//
// Each adds up within a tile first and then to what is there, which keeps the rounding error of long sums small.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace medaccel::pixel_contrast {

using simd::Vec;

// Rows whose sums are held in registers at once, two registers each: 12 of the 16 of AVX2 and SSE, 24 of
// AVX-512's 32.
constexpr int kRows = simd::kBytes == 64 ? 12 : 6;
template <class T>
constexpr int kLanes = 2 * Vec<T>::width;  // queries of a tile
// Keys of a tile: with 64 channels, 96 keys and their 96 gradients take 48 KiB in fp32.
constexpr int kKeys = 96;

// body(r, R) for r = 0 … n-1 in steps of R = kRows, then of what is left, by powers of two.
template <class Body>
inline void in_blocks(int n, const Body& body) {
    int r = 0;
    const auto block = [&](auto count) {
        body(r, count);
        r += count;
    };
    while (r + kRows <= n) block(std::integral_constant<int, kRows>());
    if (n - r >= 8) block(std::integral_constant<int, 8>());
    if (n - r >= 4) block(std::integral_constant<int, 4>());
    if (n - r >= 2) block(std::integral_constant<int, 2>());
    if (n - r >= 1) block(std::integral_constant<int, 1>());
}

// sum[R][2] += Σ_{k < n} left[r · row_step + k · step] · right[k · right_step … + 2 registers]
template <class T, int R>
inline void multiply(int n, const T* left, int64_t row_step, int64_t step, const T* right, int64_t right_step,
                     Vec<T> (&sum)[R][2]) {
    constexpr int W = Vec<T>::width;
    for (int k = 0; k < n; ++k) {
        const Vec<T> b0 = Vec<T>::load(right + k * right_step), b1 = Vec<T>::load(right + k * right_step + W);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const Vec<T> a = Vec<T>::all(left[r * row_step + k * step]);
            sum[r][0] = fma(a, b0, sum[r][0]);
            sum[r][1] = fma(a, b1, sum[r][1]);
        }
    }
}

// tile [n][kLanes], keys [n][width], columns [channels][kLanes]. top: the columns' maxima so far, and then with this
// tile's (a NaN is left out).
template <class T>
void scores(int n, int channels, const T* keys, int64_t width, const T* columns, T* tile, Vec<T> (&top)[2]) {
    constexpr int W = Vec<T>::width;
    in_blocks(n, [&](int first, auto count) {
        constexpr int R = decltype(count)::value;
        Vec<T> sum[R][2] = {};
        multiply<T, R>(channels, keys + first * width, width, 1, columns, kLanes<T>, sum);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            T* to = tile + (first + r) * kLanes<T>;
            sum[r][0].store(to);
            sum[r][1].store(to + W);
            top[0] = max(sum[r][0], top[0]);
            top[1] = max(sum[r][1], top[1]);
        }
    });
}

template <class T, int R>
inline void add(const Vec<T> (&sum)[R][2], T* to, int64_t step) {
    constexpr int W = Vec<T>::width;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        (Vec<T>::load(to + r * step) + sum[r][0]).store(to + r * step);
        (Vec<T>::load(to + r * step + W) + sum[r][1]).store(to + r * step + W);
    }
}

// sums [channels][kLanes]
template <class T>
void add_to_queries(int n, int channels, const T* keys, int64_t width, const T* tile, T* sums) {
    in_blocks(channels, [&](int first, auto count) {
        constexpr int R = decltype(count)::value;
        Vec<T> sum[R][2] = {};
        multiply<T, R>(n, keys + first, 1, width, tile, kLanes<T>, sum);
        add<T, R>(sum, sums + first * kLanes<T>, kLanes<T>);
    });
}

// rows [kLanes][width], sums [n][width]; width is a multiple of two registers.
template <class T>
void add_to_keys(int n, const T* tile, const T* rows, int64_t width, T* sums) {
    for (int64_t c = 0; c < width; c += kLanes<T>)
        in_blocks(n, [&](int first, auto count) {
            constexpr int R = decltype(count)::value;
            Vec<T> sum[R][2] = {};
            multiply<T, R>(kLanes<T>, tile + first * kLanes<T>, kLanes<T>, 1, rows + c, width, sum);
            add<T, R>(sum, sums + first * width + c, width);
        });
}

// a · b, both of `width` elements.
template <class T>
T dot(const T* a, const T* b, int64_t width) {
    constexpr int W = Vec<T>::width;
    Vec<T> sum[2] = {Vec<T>::zero(), Vec<T>::zero()};
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        sum[0] = fma(Vec<T>::load(a + c), Vec<T>::load(b + c), sum[0]);
        sum[1] = fma(Vec<T>::load(a + c + W), Vec<T>::load(b + c + W), sum[1]);
    }
    const Vec<T> both = sum[0] + sum[1];
    T total = 0;
    for (int i = 0; i < W; ++i) total += both[i];
    return total;
}

// to += weight · from
template <class T>
void add_scaled(T weight, const T* from, int64_t width, T* to) {
    constexpr int W = Vec<T>::width;
    const Vec<T> w = Vec<T>::all(weight);
    for (int64_t c = 0; c < width; c += W) fma(w, Vec<T>::load(from + c), Vec<T>::load(to + c)).store(to + c);
}

}  // namespace medaccel::pixel_contrast
