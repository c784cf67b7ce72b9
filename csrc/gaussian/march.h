// SPDX-License-Identifier: Apache-2.0
// The three passes fused: a job filters a block of z-planes in one walk along y.
//
//   z   rows of the input are combined into a ring of z-filtered rows, just before y needs them
//   y   rows of the ring are combined into a padded line
//   x   the line is convolved into the output
//
// so the volume is read a few times from cache and once from memory, written once, and the scratch is a ring
// of kRows + 2·radius rows per plane of the block: it stays in the second-level cache, whatever the volume's
// size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "axis.h"
#include "layout.h"
#include "rows.h"

namespace medaccel::gaussian {

// The part of the volume that one job writes, and the columns [xa, xb) that it reads.
struct Block {
    int64_t z0, z1, x0, x1, xa, xb;
};

// Combines rows along an axis into outputs [i0, i1). row(source) gives a row's start.
template <class T, class Row>
void combine_along(const Axis<T>& axis, const T* taps, const Row& row, const T* zeros, int64_t i0, int64_t i1,
                   T* const* out, int64_t n, std::vector<const T*>& rows) {
    int64_t i = i0;
    while (i < i1) {
        if (axis.is_folded(i)) {
            const auto& folded = axis.folded[i];
            const int count = static_cast<int>(folded.source.size());
            rows.resize(count);
            for (int m = 0; m < count; ++m) rows[m] = row(folded.source[m]);
            combine_rows<T, 1>(rows.data(), folded.weight.data(), count, out + (i - i0), n);
            ++i;
            continue;
        }
        int together = 1;
        while (together < kRows && i + together < i1 && !axis.is_folded(i + together)) ++together;
        const int count = axis.count();
        rows.resize(count + together - 1);
        for (int m = 0; m < count + together - 1; ++m) {
            const int64_t source = axis.source(i - axis.radius + m);
            rows[m] = source < 0 ? zeros : row(source);
        }
        T* const* to = out + (i - i0);
        switch (together) {
            case 4:
                combine_rows<T, 4>(rows.data(), taps, count, to, n);
                break;
            case 3:
                combine_rows<T, 3>(rows.data(), taps, count, to, n);
                break;
            case 2:
                combine_rows<T, 2>(rows.data(), taps, count, to, n);
                break;
            default:
                combine_rows<T, 1>(rows.data(), taps, count, to, n);
        }
        i += together;
    }
}

inline int64_t ring_rows(int64_t y_size, int y_radius, bool reaches_far) {
    return reaches_far ? y_size : std::min<int64_t>(y_size, kRows + 2 * y_radius);
}

// z-filtered rows of a block, made as far along y as they are asked for.
template <class T>
class Slab {
  public:
    // capacity: rows per plane of the block; zeros: a row of zeros that outlives the slab
    Slab(int64_t planes, int64_t capacity, int64_t row_length, const T* zeros)
        : capacity_(capacity), row_length_(row_length), zeros_(zeros), ring_(planes * capacity * row_length) {}

    // in: the block's first column in the volume's row (z, y) = (0, 0)
    void start(const Axis<T>& z, const T* taps, const T* in, int64_t z_stride, int64_t y_stride, const Block& b,
               int64_t n) {
        z_ = &z, taps_ = taps, in_ = in, z_stride_ = z_stride, y_stride_ = y_stride, block_ = b, n_ = n;
        filled_ = 0;
    }

    void fill(int64_t y_end) {
        if (z_->identity()) return;
        for (; filled_ < y_end; ++filled_) {
            const T* at_y = in_ + filled_ * y_stride_;
            outputs_.clear();
            for (int64_t j = 0; j < block_.z1 - block_.z0; ++j) outputs_.push_back(slot(j, filled_));
            combine_along(
                *z_, taps_, [&](int64_t source) { return at_y + source * z_stride_; }, zeros_, block_.z0, block_.z1,
                outputs_.data(), n_, rows_);
        }
    }

    // Row y of the block's plane j: straight from the input where z is not filtered.
    const T* row(int64_t j, int64_t y) {
        return z_->identity() ? in_ + (block_.z0 + j) * z_stride_ + y * y_stride_ : slot(j, y);
    }

  private:
    T* slot(int64_t j, int64_t y) { return ring_.data() + (j * capacity_ + y % capacity_) * row_length_; }

    int64_t capacity_, row_length_;
    const T* zeros_;
    std::vector<T> ring_;
    const Axis<T>* z_ = nullptr;
    const T* taps_ = nullptr;
    const T* in_ = nullptr;
    int64_t z_stride_ = 0, y_stride_ = 0, n_ = 0, filled_ = 0;
    Block block_{};
    std::vector<T*> outputs_;
    std::vector<const T*> rows_;
};

// kRows lines with room for their border on both sides, and the convolution along them.
template <class T>
class Lines {
  public:
    Lines(int64_t columns, int radius, int64_t lanes)
        : lanes_(lanes), length_((columns + 4 * radius) * lanes + simd::Vec<T>::width), padded_(kRows * length_) {}

    // Returns the place for columns [xa, xb) of line i, for an axis and a block that `convolve` is called
    // with next.
    T* interior(const Axis<T>& x, const Block& b, int64_t i) { return line(i) + (b.xa - first(x, b)) * lanes_; }

    // Fills the borders of lines 0 … count − 1, convolves, folds the adjoint's overhang back, writes columns [x0,
    // x1); large: the output will not be found in cache again.
    void convolve(const Axis<T>& x, const T* taps, const Block& b, int64_t count, T* const* out, bool large = false) {
        const int64_t left = overhang(x, b.x0 == 0), right = overhang(x, b.x1 == x.size);
        const int64_t n = (b.x1 - b.x0) * lanes_;
        for (int64_t i = 0; i < count; ++i) pad(x, b, line(i));
        if (left || right) {
            for (int64_t i = 0; i < count; ++i) convolve_and_fold(x, taps, b, left, right, line(i), out[i]);
            return;
        }
        const T* padded[kRows];
        bool stream = large;
        for (int64_t i = 0; i < count; ++i) {
            padded[i] = line(i);
            stream = stream && simd::is_aligned(out[i]);
        }
        if (count == kRows)
            convolve_lines<T, kRows>(padded, taps, x.count(), lanes_, out, n, stream);
        else
            for (int64_t i = 0; i < count; ++i)
                convolve_lines<T, 1>(padded + i, taps, x.count(), lanes_, out + i, n, stream);
        if (stream) simd::finish_streams();
    }

  private:
    T* line(int64_t i) { return padded_.data() + i * length_; }

    // The adjoint of a folding border first computes the positions outside the axis as well.
    static int64_t overhang(const Axis<T>& x, bool at_end) { return x.adjoint && at_end ? x.radius : 0; }
    static int64_t first(const Axis<T>& x, const Block& b) { return b.x0 - overhang(x, b.x0 == 0) - x.radius; }

    void pad(const Axis<T>& x, const Block& b, T* line) {
        const int64_t begin = first(x, b), end = b.x1 + overhang(x, b.x1 == x.size) + x.radius;
        const bool zeros = x.adjoint || x.border == Border::constant;
        const auto fill = [&](int64_t from, int64_t to) {
            if (zeros) {
                std::fill(line + (from - begin) * lanes_, line + (to - begin) * lanes_, T(0));
                return;
            }
            for (int64_t p = from; p < to; ++p) {
                const T* source = line + (x.source(p) - begin) * lanes_;
                for (int64_t l = 0; l < lanes_; ++l) line[(p - begin) * lanes_ + l] = source[l];
            }
        };
        fill(begin, b.xa);
        fill(b.xb, end);
    }

    void convolve_and_fold(const Axis<T>& x, const T* taps, const Block& b, int64_t left, int64_t right,
                           const T* padded, T* out) {
        const int64_t n = (b.x1 - b.x0) * lanes_;
        extended_.resize(length_);
        T* e = extended_.data();
        convolve_lines<T, 1>(&padded, taps, x.count(), lanes_, &e, n + (left + right) * lanes_, false);
        std::memcpy(out, e + left * lanes_, n * sizeof(T));
        const auto fold = [&](int64_t p) {
            const int64_t target = border_source(p, x.size, x.border);
            if (target < b.x0 || target >= b.x1) return;
            for (int64_t l = 0; l < lanes_; ++l)
                out[(target - b.x0) * lanes_ + l] += e[(p - b.x0 + left) * lanes_ + l];
        };
        for (int64_t d = 1; d <= left; ++d) fold(-d);
        for (int64_t d = 0; d < right; ++d) fold(x.size + d);
    }

    int64_t lanes_, length_;
    std::vector<T> padded_, extended_;
};

}  // namespace medaccel::gaussian
