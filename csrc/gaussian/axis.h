// SPDX-License-Identifier: Apache-2.0
// One axis of the filter: its taps, and the source that each position reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "gaussian.h"

namespace medaccel::gaussian {

template <class T>
struct Axis {
    int64_t size = 1;
    double sigma = 0;
    int radius = 0;
    Border border = Border::constant;
    bool adjoint = false;
    std::vector<double> exact{1.0};   // [2·radius + 1], the taps before rounding to T
    std::vector<T> taps{T(1)};        // [2·radius + 1]
    std::vector<T> derivative{T(0)};  // [2·radius + 1], by sigma

    // The adjoint of a filter with a folding border: the taps of the output positions near an end, which also
    // collect what the folded positions read. Empty for positions that the plain taps (with zeros outside)
    // serve.
    struct Folded {
        std::vector<int64_t> source;
        std::vector<T> weight;
    };
    std::vector<Folded> folded;

    bool identity() const { return radius == 0; }
    int count() const { return 2 * radius + 1; }

    // Returns the source of extended position p, −radius … size − 1 + radius; −1: a zero. The adjoint's plain
    // part sees zeros outside; its folded part is in `folded`.
    int64_t source(int64_t p) const { return border_source(p, size, adjoint ? Border::constant : border); }

    bool is_folded(int64_t i) const { return !folded.empty() && !folded[i].source.empty(); }

    // Positions may be read in any order, not only within `radius` of the output.
    bool reaches_far() const { return border == Border::wrap || radius >= size; }
};

// same_taps: an axis made with the same settings, whose taps are taken over if its sigma is the same; or
// null.
template <class T>
Axis<T> make_axis(int64_t size, double sigma, bool adjoint, bool with_derivative, const Settings& s,
                  const Axis<T>* same_taps) {
    Axis<T> axis;
    axis.size = size;
    axis.radius = radius_of(sigma, s.truncated);
    axis.border = s.border;
    axis.adjoint = adjoint && s.border != Border::constant;  // with zeros outside the filter is its own adjoint
    axis.sigma = sigma;
    const int r = axis.radius;
    if (same_taps && same_taps->sigma == sigma) {
        axis.exact = same_taps->exact;
        axis.taps = same_taps->taps;
        axis.derivative = same_taps->derivative;
    } else {
        std::vector<double> derivative(axis.count()), work(r + 2);
        axis.exact.resize(axis.count());
        fill_taps(sigma, r, s.approx, s.normalize, axis.exact.data(), with_derivative ? derivative.data() : nullptr,
                  work.data());
        axis.taps.assign(axis.exact.begin(), axis.exact.end());
        axis.derivative.assign(derivative.begin(), derivative.end());
    }
    if (!axis.adjoint || r == 0) return axis;

    // Transpose the folded positions: extended position p outside the axis read `source`, so `source` now
    // collects what p would have given, Σ_k t_k · in[p + k].
    std::vector<std::map<int64_t, double>> rows(size);
    for (int side = 0; side < 2; ++side)
        for (int64_t d = 1; d <= r; ++d) {
            const int64_t p = side == 0 ? -d : size - 1 + d;
            auto& row = rows[border_source(p, size, s.border)];
            for (int k = -r; k <= r; ++k)
                if (p + k >= 0 && p + k < size) row[p + k] += axis.exact[k + r];
        }
    axis.folded.resize(size);
    for (int64_t i = 0; i < size; ++i) {
        if (rows[i].empty()) continue;
        for (int k = -r; k <= r; ++k)
            if (i + k >= 0 && i + k < size) rows[i][i + k] += axis.exact[k + r];
        for (const auto& [source, weight] : rows[i]) {
            axis.folded[i].source.push_back(source);
            axis.folded[i].weight.push_back(static_cast<T>(weight));
        }
    }
    return axis;
}

}  // namespace medaccel::gaussian
