// SPDX-License-Identifier: Apache-2.0
// Separable Gaussian filter of (B, C, *spatial) volumes, 1-3 spatial axes: what the CPU kernel offers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/shapes.h"
#include "taps.h"

namespace medaccel::gaussian {

enum class Border : int { constant = 0, reflect = 1, nearest = 2, mirror = 3, wrap = 4 };

struct Settings {
    double truncated;
    Approx approx;
    Border border;
    bool normalize;
    int threads;
};

// out = the filtered input; with `adjoint`, the transposed filter (the gradient to the input).
//   in, out: (B, C, *spatial) with any strides, in elements; they must not overlap
//   sigma:   [spatial], in voxels
// Returns false, with nothing done, where in and out share no axis of unit stride to run along.
template <class T>
bool filter(const T* in, T* out, const Shape& shape, const Shape& in_strides, const Shape& out_strides,
            const double* sigma, bool adjoint, const Settings& settings);

// gradient[a] = Σ grad · ∂(filtered in)/∂sigma[a], for each spatial axis. Deterministic: fixed order, in
// double.
template <class T>
bool sigma_gradient(const T* in, const T* grad, const Shape& shape, const Shape& in_strides,
                    const Shape& grad_strides, const double* sigma, double* gradient, const Settings& settings);

// Axes are shorter than this, so that positions, borders included, fit 32 bits: a GPU divides 64-bit integers slowly.
constexpr int64_t kMaxAxis = int64_t{1} << 29;

inline void check_axis(int64_t size) {
    if (size < kMaxAxis) return;
    throw std::invalid_argument("gaussian_filter: an axis has " + std::to_string(size) +
                                " elements; expected fewer than " + std::to_string(kMaxAxis));
}

// The index that position p of the extended axis reads, p in any range; -1 stands for a zero. 0 < size < kMaxAxis.
MEDACCEL_HOST_DEVICE inline int64_t border_source(int64_t p, int64_t size, Border border) {
    if (p >= 0 && p < size) return p;
    if (border == Border::constant) return -1;
    if (border == Border::nearest || size == 1) return p < 0 ? 0 : size - 1;
    const int n = static_cast<int>(size);
    const int period = border == Border::wrap ? n : border == Border::reflect ? 2 * n : 2 * n - 2;
    int q = static_cast<int>(p) % period;
    if (q < 0) q += period;
    if (q < n) return q;
    return border == Border::reflect ? 2 * n - 1 - q : 2 * n - 2 - q;
}

}  // namespace medaccel::gaussian
