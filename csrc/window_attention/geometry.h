// SPDX-License-Identifier: Apache-2.0
// Finds the places of a window's tokens on the map, and the tokens that see each other.
//
// The map is padded at its end to whole windows, rolled by −shift and cut; all of that is arithmetic here. On a
// shifted axis the last window holds tokens from both ends of the map, which MONAI's mask keeps apart with a score
// of −100. Windows that are cut and padded alike are of one kind; there are at most 27 kinds (three per axis), and
// values that depend on the kind alone are computed once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "window_attention.h"

namespace medaccel::window_attention {

// Tokens that see each other, by their numbers in the window (row-major).
struct Segment {
    std::vector<int32_t> keys;
    std::vector<int32_t> queries;  // those of `keys` on the map: nobody reads the output of padding
    int64_t lanes = 0;             // queries, padded to whole blocks of registers
    int64_t block = 0;             // start of its [keys][lanes] block of biases in its kind's buffer
    int64_t block_size() const { return static_cast<int64_t>(keys.size()) * lanes; }
};

struct Kind {
    Segment whole;                  // all tokens
    std::vector<uint8_t> region;    // of each token; they differ only where the shift brought tokens together
    std::vector<Segment> segments;  // one per region that has a query; {whole} where there is one region
    int64_t block_size = 0;         // of all segments together
    std::vector<int64_t> windows;   // one sample's windows of this kind
    bool cut() const { return *std::max_element(region.begin(), region.end()) > 0; }
};

class Geometry {
  public:
    // lane_block: queries are handled in blocks of this many.
    Geometry(const Problem& p, int64_t lane_block) : p_(p), grid_(p.grid()) {
        for (int axis = 0; axis < 3; ++axis) classify(axis);
        const int64_t nz = classes_[0], ny = classes_[1], nx = classes_[2];
        kinds_.resize(nz * ny * nx);
        for (int64_t w = 0; w < p.windows(); ++w) {
            Kind& kind = kinds_[kind_of(w)];
            if (kind.windows.empty()) describe(kind, w, lane_block);
            kind.windows.push_back(w);
        }
    }

    const std::vector<Kind>& kinds() const { return kinds_; }

    int64_t kind_of(int64_t w) const {
        const Size3 c = coordinates(w);
        return (class_of_[0][c[0]] * classes_[1] + class_of_[1][c[1]]) * classes_[2] + class_of_[2][c[2]];
    }

    // The token's voxel in one sample's map for each token of window w; −1: padding.
    void sources(int64_t w, std::vector<int64_t>& source) const {
        const Size3 c = coordinates(w);
        source.resize(p_.tokens());
        int64_t token = 0;
        for (int64_t z = 0; z < p_.window[0]; ++z) {
            const int64_t sz = source_on(0, c[0], z);
            for (int64_t y = 0; y < p_.window[1]; ++y) {
                const int64_t sy = source_on(1, c[1], y);
                for (int64_t x = 0; x < p_.window[2]; ++x) {
                    const int64_t sx = source_on(2, c[2], x);
                    const bool inside = sz >= 0 && sy >= 0 && sx >= 0;
                    source[token++] = inside ? (sz * p_.sizes[1] + sy) * p_.sizes[2] + sx : -1;
                }
            }
        }
    }

  private:
    Size3 coordinates(int64_t w) const { return {w / (grid_[1] * grid_[2]), w / grid_[2] % grid_[1], w % grid_[2]}; }

    // The position on the map of an axis' token t in the window with coordinate c; −1: padding.
    int64_t source_on(int axis, int64_t c, int64_t t) const {
        const int64_t padded = grid_[axis] * p_.window[axis];
        int64_t position = c * p_.window[axis] + t + p_.shift[axis];
        if (position >= padded) position -= padded;
        return position < p_.sizes[axis] ? position : -1;
    }

    // Windows of an axis are alike where the same tokens are padding and the cut, if any, is in the same place.
    void classify(int axis) {
        std::vector<std::vector<bool>> seen;
        class_of_[axis].resize(grid_[axis]);
        for (int64_t c = 0; c < grid_[axis]; ++c) {
            std::vector<bool> marks;
            for (int64_t t = 0; t < p_.window[axis]; ++t) marks.push_back(source_on(axis, c, t) < 0);
            marks.push_back(p_.shift[axis] > 0 && c == grid_[axis] - 1);
            const auto found = std::find(seen.begin(), seen.end(), marks);
            class_of_[axis][c] = found - seen.begin();
            if (found == seen.end()) seen.push_back(marks);
        }
        classes_[axis] = static_cast<int64_t>(seen.size());
    }

    void describe(Kind& kind, int64_t w, int64_t lane_block) const {
        std::vector<int64_t> source;
        sources(w, source);
        const Size3 c = coordinates(w);
        const auto wrapped = [&](int axis, int64_t t) {
            return p_.shift[axis] > 0 && c[axis] == grid_[axis] - 1 && t >= p_.window[axis] - p_.shift[axis];
        };
        int32_t token = 0;
        for (int64_t z = 0; z < p_.window[0]; ++z)
            for (int64_t y = 0; y < p_.window[1]; ++y)
                for (int64_t x = 0; x < p_.window[2]; ++x, ++token) {
                    kind.region.push_back(4 * wrapped(0, z) + 2 * wrapped(1, y) + wrapped(2, x));
                    add(kind.whole, token, source[token]);
                }
        for (uint8_t region = 0; region < 8; ++region) {
            Segment s;
            for (int32_t t = 0; t < token; ++t)
                if (kind.region[t] == region) add(s, t, source[t]);
            if (!s.queries.empty()) kind.segments.push_back(s);
        }
        const auto whole_blocks = [&](Segment& s) {
            const auto n = static_cast<int64_t>(s.queries.size());
            s.lanes = (n + lane_block - 1) / lane_block * lane_block;
        };
        whole_blocks(kind.whole);
        for (Segment& s : kind.segments) {
            whole_blocks(s);
            s.block = kind.block_size;
            kind.block_size += s.block_size();
        }
    }

    static void add(Segment& s, int32_t token, int64_t source) {
        s.keys.push_back(token);
        if (source >= 0) s.queries.push_back(token);
    }

    Problem p_;
    Size3 grid_;
    std::array<std::vector<int64_t>, 3> class_of_;
    std::array<int64_t, 3> classes_;
    std::vector<Kind> kinds_;
};

}  // namespace medaccel::window_attention
