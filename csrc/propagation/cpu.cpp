// SPDX-License-Identifier: Apache-2.0
// Pixel propagation on the CPU, forward and backward.
//
// A weight is the same in both directions, so the gradients by pixel i are sums over j too, with what flows from i to
// j and back taken together: a job owns some tiles of pixels and walks over all others, and nothing has to be merged.
//
//   values:   dv_i = Σ_j w_ij · g_j
//   features: dx_i = Σ_j w'(s_ij) · (g_i · v_j + g_j · v_i) · x_j          s_ij: the cosine, g: the output's gradient
#include "propagation.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../pixel_contrast/unit_rows.h"

namespace medaccel::propagation {
namespace {

using pixel_contrast::add_to_queries;
using pixel_contrast::kKeys;
using pixel_contrast::kLanes;
using pixel_contrast::scores;
using pixel_contrast::UnitRows;
using simd::Vec;

constexpr int64_t kGroup = 4;  // tiles of pixels that share a pass over the others

// max(s, 0)^power, or its slope. A NaN stays.
template <class T>
void weigh(int n, double power, bool slope, T* tile) {
    constexpr int W = Vec<T>::width;
    const Vec<T> zero = Vec<T>::zero();
    const T exponent = static_cast<T>(slope ? power - 1 : power);
    const Vec<T> factor = Vec<T>::all(static_cast<T>(slope ? power : 1));
    for (int i = 0; i < n * kLanes<T>; i += W) {
        const Vec<T> s = max(zero, Vec<T>::load(tile + i));  // this order keeps a NaN
        if (exponent == 1) {
            (factor * s).store(tile + i);
        } else if (exponent == 2) {
            (factor * s * s).store(tile + i);
        } else {
            s.store(tile + i);
            for (int k = i; k < i + W; ++k)
                if (tile[k] != 0) tile[k] = factor[0] * std::pow(tile[k], exponent);
        }
    }
}

// columns [channels][kLanes] from rows [n][width]
template <class T>
void load_columns(int64_t n, int64_t channels, const T* rows, int64_t width, T* columns) {
    std::fill_n(columns, channels * kLanes<T>, T(0));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < channels; ++c) columns[c * kLanes<T> + i] = rows[i * width + c];
}

// sums [channels][kLanes] to rows [n][width]
template <class T>
void store_columns(int64_t n, int64_t channels, const T* sums, T* rows, int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < channels; ++c) rows[i * width + c] = sums[c * kLanes<T> + i];
}

template <class T>
struct Scratch {
    std::vector<T> columns, value_columns, grad_columns, sums, value_sums, tile, flow, back;
};

// body(sample, first pixel, number of pixels, first other, number of others, tile within the group, scratch) for all
// pairs of tiles; begin and end before and after a group's pass. Groups in parallel.
template <class T, class Begin, class Body, class End>
void each_tile(const Problem& p, const Begin& begin, const Body& body, const End& end) {
    const int64_t per_group = kGroup * kLanes<T>, groups = (p.pixels + per_group - 1) / per_group;
    parallel_for(
        p.batch * groups, p.threads, [] { return Scratch<T>(); },
        [&](int64_t job, Scratch<T>& s) {
            const int64_t sample = job / groups, first = job % groups * per_group;
            const int64_t last = std::min(p.pixels, first + per_group);
            const auto each = [&](const auto& call) {
                for (int64_t i = first; i < last; i += kLanes<T>)
                    call(sample * p.pixels + i, std::min<int64_t>(kLanes<T>, last - i), (i - first) / kLanes<T>);
            };
            s.tile.resize(kKeys * kLanes<T>);
            each([&](int64_t i, int64_t n, int64_t t) { begin(i, n, t, s); });
            for (int64_t j = 0; j < p.pixels; j += kKeys) {
                const int m = static_cast<int>(std::min<int64_t>(kKeys, p.pixels - j));
                each([&](int64_t, int64_t, int64_t t) { body(sample * p.pixels + j, m, t, s); });
            }
            each([&](int64_t i, int64_t n, int64_t t) { end(i, n, t, s); });
        });
}

}  // namespace

template <class T>
void forward(const T* features, const T* values, T* out, const Problem& p) {
    const UnitRows<T> x(features, p.batch * p.pixels, p.channels, p.threads);
    const int64_t C = p.channels * kLanes<T>, D = p.value_channels * kLanes<T>;
    each_tile<T>(
        p,
        [&](int64_t i, int64_t n, int64_t t, Scratch<T>& s) {
            s.columns.resize(kGroup * C), s.value_sums.resize(kGroup * D);
            load_columns(n, p.channels, x.row(i), x.width, s.columns.data() + t * C);
            std::fill_n(s.value_sums.data() + t * D, D, T(0));
        },
        [&](int64_t j, int m, int64_t t, Scratch<T>& s) {
            Vec<T> unused[2] = {};
            scores<T>(m, static_cast<int>(p.channels), x.row(j), x.width, s.columns.data() + t * C, s.tile.data(),
                      unused);
            weigh(m, p.power, false, s.tile.data());
            add_to_queries<T>(m, static_cast<int>(p.value_channels), values + j * p.value_channels, p.value_channels,
                              s.tile.data(), s.value_sums.data() + t * D);
        },
        [&](int64_t i, int64_t n, int64_t t, Scratch<T>& s) {
            store_columns(n, p.value_channels, s.value_sums.data() + t * D, out + i * p.value_channels,
                          p.value_channels);
        });
}

template <class T>
void backward(const T* grad, const T* features, const T* values, T* grad_features, T* grad_values, const Problem& p) {
    const UnitRows<T> x(features, p.batch * p.pixels, p.channels, p.threads);
    const int64_t C = p.channels * kLanes<T>, D = p.value_channels * kLanes<T>;
    const int channels = static_cast<int>(p.channels), value_channels = static_cast<int>(p.value_channels);
    std::vector<T> feature_sums;
    if (grad_features) feature_sums = x.zeros();
    each_tile<T>(
        p,
        [&](int64_t i, int64_t n, int64_t t, Scratch<T>& s) {
            s.columns.resize(kGroup * C), s.sums.resize(kGroup * C), s.value_columns.resize(kGroup * D);
            s.grad_columns.resize(kGroup * D), s.value_sums.resize(kGroup * D);
            s.flow.resize(s.tile.size()), s.back.resize(s.tile.size());
            load_columns(n, p.channels, x.row(i), x.width, s.columns.data() + t * C);
            load_columns(n, p.value_channels, values + i * p.value_channels, p.value_channels,
                         s.value_columns.data() + t * D);
            load_columns(n, p.value_channels, grad + i * p.value_channels, p.value_channels,
                         s.grad_columns.data() + t * D);
            std::fill_n(s.sums.data() + t * C, C, T(0));
            std::fill_n(s.value_sums.data() + t * D, D, T(0));
        },
        [&](int64_t j, int m, int64_t t, Scratch<T>& s) {
            Vec<T> unused[2] = {};
            const T *v = values + j * p.value_channels, *g = grad + j * p.value_channels;
            scores<T>(m, channels, x.row(j), x.width, s.columns.data() + t * C, s.tile.data(), unused);
            if (grad_features) {
                scores<T>(m, value_channels, v, p.value_channels, s.grad_columns.data() + t * D, s.flow.data(),
                          unused);
                scores<T>(m, value_channels, g, p.value_channels, s.value_columns.data() + t * D, s.back.data(),
                          unused);
                T* slope = s.back.data();
                for (int e = 0; e < m * kLanes<T>; ++e) s.flow[e] += s.back[e];
                std::copy_n(s.tile.data(), m * kLanes<T>, slope);
                weigh(m, p.power, true, slope);
                for (int e = 0; e < m * kLanes<T>; ++e) s.flow[e] *= slope[e];
                add_to_queries<T>(m, channels, x.row(j), x.width, s.flow.data(), s.sums.data() + t * C);
            }
            if (grad_values) {
                weigh(m, p.power, false, s.tile.data());
                add_to_queries<T>(m, value_channels, g, p.value_channels, s.tile.data(), s.value_sums.data() + t * D);
            }
        },
        [&](int64_t i, int64_t n, int64_t t, Scratch<T>& s) {
            if (grad_features)
                store_columns(n, p.channels, s.sums.data() + t * C, feature_sums.data() + i * x.width, x.width);
            if (grad_values)
                store_columns(n, p.value_channels, s.value_sums.data() + t * D, grad_values + i * p.value_channels,
                              p.value_channels);
        });
    if (grad_features) x.gradient(feature_sums, grad_features);
}

#define MEDACCEL_INSTANTIATE(T)                                    \
    template void forward(const T*, const T*, T*, const Problem&); \
    template void backward(const T*, const T*, const T*, T*, T*, const Problem&);
MEDACCEL_INSTANTIATE(float)
MEDACCEL_INSTANTIATE(double)

}  // namespace medaccel::propagation
