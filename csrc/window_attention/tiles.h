// SPDX-License-Identifier: Apache-2.0
// The small matrix products of attention, on tiles that stay in the first-level cache.
//
// Queries lie across a register's lanes. So a softmax needs no sum across lanes, a key's or a value's element is one
// broadcast, and one shape of loop serves scores, outputs and their gradients:
//
//   tile[key][query]    = Σ_c keys[key][c] · queries[c][query]       product_into_tile
//   sum[c][query]      += Σ_key keys[key][c] · tile[key][query]      add_columns
//   sum[key][c]        += Σ_query tile[key][query] · rows[query][c]  add_rows
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace medaccel::window_attention {

using simd::Vec;

// Rows or columns whose sums are held in registers at once: 4 × 2 of AVX2's 16, 8 × 2 of AVX-512's 32.
constexpr int kRows = simd::kBytes == 64 ? 8 : 4;
// Queries of a tile: two registers, so that a broadcast serves two multiplications.
template <class T>
constexpr int kLanes = 2 * Vec<T>::width;
// Keys of a tile: 128 × 16 floats take 8 KiB.
constexpr int kKeys = 128;

template <class T, int R, class... Top>
inline void product_rows(int d, const T* keys, const T* queries, int64_t query_stride, const T* start,
                         int64_t start_stride, T* tile, Top&... top) {
    constexpr int W = Vec<T>::width;
    Vec<T> sum[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        sum[r][0] = Vec<T>::load(start + r * start_stride);
        sum[r][1] = Vec<T>::load(start + r * start_stride + W);
    }
    for (int c = 0; c < d; ++c) {
        const Vec<T> q0 = Vec<T>::load(queries + c * query_stride);
        const Vec<T> q1 = Vec<T>::load(queries + c * query_stride + W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec<T> k = Vec<T>::all(keys[r * d + c]);
            sum[r][0] = fma(k, q0, sum[r][0]);
            sum[r][1] = fma(k, q1, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        sum[r][0].store(tile + r * kLanes<T>);
        sum[r][1].store(tile + r * kLanes<T> + W);
        ((top[0] = max(sum[r][0], top[0]), top[1] = max(sum[r][1], top[1])), ...);
    }
}

// tile[n][kLanes] = start + keys · queries, with keys [n][d], queries [d][query_stride] and start [n][start_stride];
// a start_stride of 0 gives every row the same start. top, where it is given, is two registers: the columns' maxima
// so far, and with this tile's.
template <class T, class... Top>
void product_into_tile(int n, int d, const T* keys, const T* queries, int64_t query_stride, const T* start,
                       int64_t start_stride, T* tile, Top&... top) {
    int r = 0;
    const auto rows = [&](auto count) {
        product_rows<T, decltype(count)::value>(d, keys + r * d, queries, query_stride, start + r * start_stride,
                                                start_stride, tile + r * kLanes<T>, top...);
        r += count;
    };
    while (r + kRows <= n) rows(std::integral_constant<int, kRows>());
    while (r < n) rows(std::integral_constant<int, 1>());
}

template <class T, int C>
inline void columns(int n, int d, const T* keys, const T* tile, T* sum) {
    constexpr int W = Vec<T>::width;
    Vec<T> s[C][2];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
        s[c][0] = Vec<T>::load(sum + c * kLanes<T>);
        s[c][1] = Vec<T>::load(sum + c * kLanes<T> + W);
    }
    for (int k = 0; k < n; ++k) {
        const Vec<T> t0 = Vec<T>::load(tile + k * kLanes<T>);
        const Vec<T> t1 = Vec<T>::load(tile + k * kLanes<T> + W);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const Vec<T> v = Vec<T>::all(keys[k * d + c]);
            s[c][0] = fma(v, t0, s[c][0]);
            s[c][1] = fma(v, t1, s[c][1]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
        s[c][0].store(sum + c * kLanes<T>);
        s[c][1].store(sum + c * kLanes<T> + W);
    }
}

// sum[d][kLanes] += keysᵀ · tile, with keys [n][d] and tile [n][kLanes]; d is a multiple of 4.
template <class T>
void add_columns(int n, int d, const T* keys, const T* tile, T* sum) {
    int c = 0;
    for (; c + kRows <= d; c += kRows) columns<T, kRows>(n, d, keys + c, tile, sum + c * kLanes<T>);
    for (; c < d; c += 4) columns<T, 4>(n, d, keys + c, tile, sum + c * kLanes<T>);
}

// A row of `add_rows`: a head's d channels in whole registers. Where d fills only a part of one, G = width / d
// queries share it, channel by channel: lane c · G + g holds channel c of query g.
template <class T>
struct RowLayout {
    int group = 1;      // G
    int registers = 1;  // per group of G queries
    explicit RowLayout(int d) {
        constexpr int W = Vec<T>::width;
        int rounded = 4;
        while (rounded < d && rounded < W) rounded *= 2;
        if (rounded < W) group = W / rounded;
        registers = d <= W ? 1 : (d + W - 1) / W;
    }
    int width() const { return registers * Vec<T>::width; }
    // Returns the place of query i's channel 0 in packed rows; channel c lies c · group further on.
    int64_t at(int64_t i) const { return i / group * width() + i % group; }
};

template <class T, int R, int G>
inline void rows(const T* tile, const T* packed, int width, T* sum) {
    Vec<T> s[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) s[r] = Vec<T>::load(sum + r * width);
    for (int i = 0; i < kLanes<T>; i += G) {
        const Vec<T> x = Vec<T>::load(packed + i / G * width);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) s[r] = fma(simd::repeat<G>(tile + r * kLanes<T> + i), x, s[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) s[r].store(sum + r * width);
}

template <class T, int G>
void add_rows_grouped(int n, const T* tile, const T* packed, int width, T* sum) {
    constexpr int R = 8;  // one register a row here: eight rows hide the multiplication's latency
    for (int part = 0; part < width; part += Vec<T>::width) {
        int k = 0;
        for (; k + R <= n; k += R) rows<T, R, G>(tile + k * kLanes<T>, packed + part, width, sum + k * width + part);
        for (; k < n; ++k) rows<T, 1, G>(tile + k * kLanes<T>, packed + part, width, sum + k * width + part);
    }
}

// sum[n][layout.width()] += tile · rows, with tile [n][kLanes] and the rows of kLanes queries in `layout`.
template <class T>
void add_rows(int n, const RowLayout<T>& layout, const T* tile, const T* packed, T* sum) {
    if (layout.group == 1) return add_rows_grouped<T, 1>(n, tile, packed, layout.width(), sum);
    if constexpr (Vec<T>::width >= 8) {
        if (layout.group == 2) return add_rows_grouped<T, 2>(n, tile, packed, layout.width(), sum);
    }
    if constexpr (Vec<T>::width >= 16) return add_rows_grouped<T, 4>(n, tile, packed, layout.width(), sum);
}

}  // namespace medaccel::window_attention
