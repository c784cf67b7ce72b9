// SPDX-License-Identifier: Apache-2.0
// The two inner loops of the filter. Every output element sums its taps in the same order, one fused
// multiply-add each, whichever loop and whichever lane computes it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/simd.h"

namespace medaccel::gaussian {

// Output rows that share their loads: with 4 rows of 2 registers each, 8 accumulators, 2 loads and 1 tap fit
// the 16 registers of AVX2, and each load feeds up to 4 multiply-adds.
constexpr int kRows = 4;

template <class T, int J, int U>
inline void combine_block(const T* const* rows, const T* taps, int count, T* const* out, int64_t i) {
    using V = simd::Vec<T>;
    V acc[J][U];
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) acc[j][u] = V::zero();
    const auto edge = [&](int m) {  // some of the J outputs don't read row m: skipped, since 0 · NaN is NaN
        for (int j = 0; j < J; ++j) {
            if (static_cast<unsigned>(m - j) >= static_cast<unsigned>(count)) continue;
            const V t = V::all(taps[m - j]);
            for (int u = 0; u < U; ++u) acc[j][u] = fma(V::load(rows[m] + i + u * V::width), t, acc[j][u]);
        }
    };
    int m = 0;
    for (; m < J - 1; ++m) edge(m);
    for (; m < count; ++m) {
        V a[U];
        for (int u = 0; u < U; ++u) a[u] = V::load(rows[m] + i + u * V::width);
        for (int j = 0; j < J; ++j) {
            const V t = V::all(taps[m - j]);
            for (int u = 0; u < U; ++u) acc[j][u] = fma(a[u], t, acc[j][u]);
        }
    }
    for (; m < count + J - 1; ++m) edge(m);
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) acc[j][u].store(out[j] + i + u * V::width);
}

// out[j][i] = Σ_k taps[k] · rows[j + k][i], for j < J and i < n.  rows: [J + count − 1], each [n]
template <class T, int J>
inline void combine_rows(const T* const* rows, const T* taps, int count, T* const* out, int64_t n) {
    constexpr int W = simd::Vec<T>::width;
    if (n < W) {
        for (int j = 0; j < J; ++j)
            for (int64_t i = 0; i < n; ++i) {
                T sum = 0;
                for (int k = 0; k < count; ++k) sum = simd::fma(rows[j + k][i], taps[k], sum);
                out[j][i] = sum;
            }
        return;
    }
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) combine_block<T, J, 2>(rows, taps, count, out, i);
    for (; i + W <= n; i += W) combine_block<T, J, 1>(rows, taps, count, out, i);
    if (i < n) combine_block<T, J, 1>(rows, taps, count, out, n - W);  // overlaps: the same values once more
}

template <class T, int J, int U>
inline void convolve_block(const T* const* padded, const T* taps, int count, int64_t step, int64_t i, T* const* out) {
    using V = simd::Vec<T>;
    V acc[J][U];
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) acc[j][u] = V::zero();
    for (int k = 0; k < count; ++k) {
        const V t = V::all(taps[k]);
        for (int j = 0; j < J; ++j)
            for (int u = 0; u < U; ++u)
                acc[j][u] = fma(V::load(padded[j] + i + k * step + u * V::width), t, acc[j][u]);
    }
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) acc[j][u].store(out[j] + u * V::width);
}

// out[j][i] = Σ_k taps[k] · padded[j][i + k · step], for j < J and i < n. Several lines at once keep enough
// multiply-adds in flight even where a line is only a register or two long.
// padded[j]: [n + (count − 1) · step] and one register to spare
template <class T, int J>
inline void convolve_lines(const T* const* padded, const T* taps, int count, int64_t step, T* const* out, int64_t n) {
    constexpr int W = simd::Vec<T>::width, U = J == 1 ? 6 : 2;
    T* to[J];
    const auto at = [&](int64_t i) {
        for (int j = 0; j < J; ++j) to[j] = out[j] + i;
        return to;
    };
    int64_t i = 0;
    for (; i + U * W <= n; i += U * W) convolve_block<T, J, U>(padded, taps, count, step, i, at(i));
    for (; i + W <= n; i += W) convolve_block<T, J, 1>(padded, taps, count, step, i, at(i));
    if (i == n) return;
    T last[J][W];
    for (int j = 0; j < J; ++j) to[j] = last[j];
    convolve_block<T, J, 1>(padded, taps, count, step, i, to);
    for (int j = 0; j < J; ++j) std::memcpy(out[j] + i, last[j], (n - i) * sizeof(T));
}

// Σ a[i] · b[i] in double.
template <class T>
inline double dot(const T* a, const T* b, int64_t n) {
    constexpr int kLanes = 8;
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l)
            lanes[l] = simd::fma(static_cast<double>(a[i + l]), static_cast<double>(b[i + l]), lanes[l]);
    double sum = 0;
    for (; i < n; ++i) sum = simd::fma(static_cast<double>(a[i]), static_cast<double>(b[i]), sum);
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    return sum;
}

}  // namespace medaccel::gaussian
