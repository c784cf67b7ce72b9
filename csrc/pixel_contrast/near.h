// SPDX-License-Identifier: Apache-2.0
// Finds the points of two sets that lie within a radius of each other.
//
// A feature map's pixels come in row-major order, so a block of consecutive ones fills a small box: most pairs of
// blocks are too far apart to be looked into. A box's distance is computed as a point's is, step by step, and
// rounding keeps the order of numbers: a box that is left out holds no point that the plain comparison would accept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/parallel.h"

namespace medaccel::pixel_contrast {

template <class U>
class Points {
  public:
    static constexpr int kBlock = 64;

    // coords: [n][axes], 1-3 axes; the others are 0
    Points(const U* coords, int64_t n, int64_t axes) : n_(n) {
        constexpr U inf = std::numeric_limits<U>::infinity();
        // The last block is filled up with NaN, which is near to nothing.
        coords_.assign(blocks() * kAxes * kBlock, std::numeric_limits<U>::quiet_NaN());
        low_.assign(blocks() * kAxes, inf);
        high_.assign(blocks() * kAxes, -inf);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t a = 0; a < kAxes; ++a) {
                const int64_t block = i / kBlock;
                const U x = a < axes ? coords[i * axes + a] : U(0);
                coords_[(block * kAxes + a) * kBlock + i % kBlock] = x;
                low_[block * kAxes + a] = std::min(low_[block * kAxes + a], x);  // a NaN changes neither
                high_[block * kAxes + a] = std::max(high_[block * kAxes + a], x);
            }
    }

    int64_t blocks() const { return (n_ + kBlock - 1) / kBlock; }
    int64_t count() const { return n_; }

    // visit(i, j) for each point i of this set's block and each point j of `others` with Σ(Δ)² < radius², i and then
    // j ascending. cull: whether far blocks are left out (the result is the same).
    template <class Visit>
    void each_near(int64_t block, const Points& others, U radius, std::vector<int64_t>& candidates, bool cull,
                   const Visit& visit) const {
        const U limit = radius * radius;
        candidates.clear();
        for (int64_t other = 0; other < others.blocks(); ++other)
            if (!cull || gap(&low_[block * kAxes], &high_[block * kAxes], others, other) < limit)
                candidates.push_back(other);
        const int64_t end = std::min<int64_t>(kBlock, n_ - block * kBlock);
        for (int64_t i = 0; i < end; ++i) {
            U point[kAxes];
            for (int64_t a = 0; a < kAxes; ++a) point[a] = coords_[(block * kAxes + a) * kBlock + i];
            for (const int64_t other : candidates) {
                if (cull && !(gap(point, point, others, other) < limit)) continue;
                U squared[kBlock] = {};
                for (int64_t a = 0; a < kAxes; ++a) {
                    const U* x = &others.coords_[(other * kAxes + a) * kBlock];
                    for (int j = 0; j < kBlock; ++j) {
                        const U difference = point[a] - x[j];
                        squared[j] += difference * difference;
                    }
                }
                bool any = false;
                for (int j = 0; j < kBlock; ++j) any |= squared[j] < limit;
                if (!any) continue;
                for (int j = 0; j < kBlock; ++j)
                    if (squared[j] < limit) visit(block * kBlock + i, other * kBlock + j);
            }
        }
    }

  private:
    static constexpr int kAxes = 3;

    // The squared distance of two boxes; NaN counts as 0, so that no box is left out for it.
    U gap(const U* low, const U* high, const Points& others, int64_t other) const {
        U squared = 0;
        for (int64_t a = 0; a < kAxes; ++a) {
            const U l = others.low_[other * kAxes + a], h = others.high_[other * kAxes + a];
            const U d = std::max(std::max(U(0), l - high[a]), low[a] - h);
            squared += d * d;
        }
        return squared;
    }

    int64_t n_;
    std::vector<U> coords_;      // [block][axis][kBlock]
    std::vector<U> low_, high_;  // [block][axis]
};

// coords: [batch][n][axes]
template <class U>
std::vector<Points<U>> samples_of(const U* coords, int64_t batch, int64_t n, int64_t axes) {
    std::vector<Points<U>> samples;
    for (int64_t b = 0; b < batch; ++b) samples.emplace_back(coords + b * n * axes, n, axes);
    return samples;
}

// visit(sample, i, j) for the near pairs of each block of `points`, the blocks in parallel: the pairs of one i come
// in order, from one thread. radius: [batch].
template <class U, class Visit>
void each_pair(const std::vector<Points<U>>& points, const std::vector<Points<U>>& others, const U* radius,
               int threads, bool cull, const Visit& visit) {
    if (points.empty()) return;
    const int64_t blocks = points[0].blocks();
    parallel_for(
        static_cast<int64_t>(points.size()) * blocks, threads, [] { return std::vector<int64_t>(); },
        [&](int64_t job, std::vector<int64_t>& candidates) {
            const int64_t b = job / blocks;
            points[b].each_near(job % blocks, others[b], radius[b], candidates, cull,
                                [&](int64_t i, int64_t j) { visit(b, i, j); });
        });
}

}  // namespace medaccel::pixel_contrast
