// SPDX-License-Identifier: Apache-2.0
// Feature vectors, normalised and padded to whole registers, and the way back for their gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/parallel.h"
#include "products.h"

namespace medaccel::pixel_contrast {

constexpr int64_t kRowsPerJob = 256;
// Squares beyond these lose digits or overflow, even in double; the row is then scaled by a power of two first. No
// row of floats comes here, but one of zeros.
constexpr double kLeastSquares = 0x1p-900, kMostSquares = 0x1p+900, kRescaling = 0x1p+600;

// body(i) for i = 0 … n-1, in parallel.
template <class Body>
void each_row(int64_t n, int threads, const Body& body) {
    parallel_for((n + kRowsPerJob - 1) / kRowsPerJob, threads, [] { return 0; },
                 [&](int64_t job, int&) {
                     const int64_t end = std::min(n, (job + 1) * kRowsPerJob);
                     for (int64_t i = job * kRowsPerJob; i < end; ++i) body(i);
                 });
}

template <class T>
class UnitRows {
  public:
    // x: [n][channels]
    UnitRows(const T* x, int64_t n, int64_t channels, int threads)
        : width((channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
          n_(n),
          channels_(channels),
          threads_(threads),
          rows_(n * width),
          inverse_(n),
          scale_(n, 1) {
        each_row(n, threads, [&](int64_t i) {
            const T* from = x + i * channels;
            double squares = sum_of_squares(from, 1);
            if (squares < kLeastSquares || squares > kMostSquares) {
                scale_[i] = squares < kLeastSquares ? kRescaling : 1 / kRescaling;
                squares = sum_of_squares(from, scale_[i]);
            }
            // A vector without direction is at right angles to all: its cosines and its gradient are 0.
            inverse_[i] = squares == 0 ? 0 : 1 / std::sqrt(squares);
            for (int64_t c = 0; c < channels; ++c)
                rows_[i * width + c] = static_cast<T>(from[c] * scale_[i] * inverse_[i]);
        });
    }

    const T* row(int64_t i) const { return rows_.data() + i * width; }
    std::vector<T> zeros() const { return std::vector<T>(rows_.size()); }

    // grad [n][width], by the unit vectors, to out [n][channels], by the vectors themselves.
    void gradient(const std::vector<T>& grad, T* out) const {
        each_row(n_, threads_, [&](int64_t i) {
            const T *g = grad.data() + i * width, *unit = row(i);
            double along = 0;
            for (int64_t c = 0; c < channels_; ++c) along += double(g[c]) * unit[c];
            for (int64_t c = 0; c < channels_; ++c)
                out[i * channels_ + c] = static_cast<T>((g[c] - along * unit[c]) * inverse_[i] * scale_[i]);
        });
    }

    const int64_t width;

  private:
    double sum_of_squares(const T* row, double scale) const {
        double squares = 0;
        for (int64_t c = 0; c < channels_; ++c) squares += (row[c] * scale) * (row[c] * scale);
        return squares;
    }

    int64_t n_, channels_;
    int threads_;
    std::vector<T> rows_;                  // [n][width]
    std::vector<double> inverse_, scale_;  // 1 / length of the row times its scale, which is nearly always 1
};

}  // namespace medaccel::pixel_contrast
