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
    // Row m feeds output j with tap m − j. The first and last J − 1 rows feed only some outputs; the others are
    // skipped there, since 0 · NaN is NaN.
    const auto add = [&](int m, int first, int last) __attribute__((always_inline)) {
        V a[U];
        for (int u = 0; u < U; ++u) a[u] = V::load(rows[m] + i + u * V::width);
        for (int j = 0; j < J; ++j) {
            if (j < first || j > last) continue;
            const V t = V::all(taps[m - j]);
            for (int u = 0; u < U; ++u) acc[j][u] = fma(a[u], t, acc[j][u]);
        }
    };
    if (count >= J) {
#pragma GCC unroll 8
        for (int m = 0; m < J - 1; ++m) add(m, 0, m);
        for (int m = J - 1; m < count; ++m) add(m, 0, J - 1);
#pragma GCC unroll 8
        for (int e = 1; e < J; ++e) add(count - 1 + e, e, J - 1);
    } else {
        for (int m = 0; m < count + J - 1; ++m) add(m, m - count + 1 > 0 ? m - count + 1 : 0, m < J ? m : J - 1);
    }
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

// Taps s, s + W, s + 2W, … of a line's positions i … i + U·W − 1 (W: a register's width) read the same registers one
// step apart, so each load feeds N multiply-adds. N ≤ kStrided taps at a time.
constexpr int kStrided = 4;

template <class T, int J, int U, int N>
inline void convolve_strided(const T* const* padded, const T* taps, int64_t i, simd::Vec<T> (&acc)[J][U]) {
    using V = simd::Vec<T>;
    V t[N];
    for (int n = 0; n < N; ++n) t[n] = V::all(taps[n * V::width]);
    for (int j = 0; j < J; ++j) {
        const T* p = padded[j] + i;
#pragma GCC unroll 16
        for (int q = 0; q < U + N - 1; ++q) {
            const V v = V::load(p + q * V::width);
#pragma GCC unroll 16
            for (int u = 0; u < U; ++u)
                if (q - u >= 0 && q - u < N) acc[j][u] = fma(v, t[q - u], acc[j][u]);
        }
    }
}

template <class T, int J, int U>
inline void convolve_block(const T* const* padded, const T* taps, int count, int64_t step, int64_t i, T* const* out,
                           bool stream) {
    using V = simd::Vec<T>;
    constexpr int W = V::width;
    V acc[J][U];
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) acc[j][u] = V::zero();
    if (step == 1) {
        for (int first = 0; first < count; first += kStrided * W) {
            const int left = count - first < kStrided * W ? count - first : kStrided * W;
            for (int s = 0; s < W && s < left; ++s) {
                const T* t = taps + first + s;
                const int64_t at = i + first + s;
                switch ((left - s + W - 1) / W) {
                    case 4:
                        convolve_strided<T, J, U, 4>(padded, t, at, acc);
                        break;
                    case 3:
                        convolve_strided<T, J, U, 3>(padded, t, at, acc);
                        break;
                    case 2:
                        convolve_strided<T, J, U, 2>(padded, t, at, acc);
                        break;
                    default:
                        convolve_strided<T, J, U, 1>(padded, t, at, acc);
                }
            }
        }
    } else {
        for (int k = 0; k < count; ++k) {
            const V t = V::all(taps[k]);
            for (int j = 0; j < J; ++j)
                for (int u = 0; u < U; ++u) acc[j][u] = fma(V::load(padded[j] + i + k * step + u * W), t, acc[j][u]);
        }
    }
    for (int j = 0; j < J; ++j)
        for (int u = 0; u < U; ++u) {
            if (stream)
                acc[j][u].stream(out[j] + u * W);
            else
                acc[j][u].store(out[j] + u * W);
        }
}

// out[j][i] = Σ_k taps[k] · padded[j][i + k · step], for j < J and i < n. Several lines at once keep enough
// multiply-adds in flight even where a line is only a register or two long.
// padded[j]: [n + (count − 1) · step] and one register to spare
// stream: the outputs are aligned and too large to be read again from cache: written past it
template <class T, int J>
inline void convolve_lines(const T* const* padded, const T* taps, int count, int64_t step, T* const* out, int64_t n,
                           bool stream) {
    constexpr int W = simd::Vec<T>::width, U = 8;
    T* to[J];
    const auto at = [&](int j, int64_t i) {
        to[j] = out[j] + i;
        return to + j;
    };
    int64_t i = 0;
    for (; i + U * W <= n; i += U * W)
        for (int j = 0; j < J; ++j) convolve_block<T, 1, U>(padded + j, taps, count, step, i, at(j, i), stream);
    const auto all_at = [&](int64_t i) {
        for (int j = 0; j < J; ++j) at(j, i);
        return to;
    };
    for (; i + 2 * W <= n; i += 2 * W) convolve_block<T, J, 2>(padded, taps, count, step, i, all_at(i), stream);
    for (; i + W <= n; i += W) convolve_block<T, J, 1>(padded, taps, count, step, i, all_at(i), stream);
    if (i == n) return;
    T last[J][W];
    for (int j = 0; j < J; ++j) to[j] = last[j];
    convolve_block<T, J, 1>(padded, taps, count, step, i, to, false);
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
