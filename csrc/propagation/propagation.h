// SPDX-License-Identifier: Apache-2.0
// Each pixel's value becomes a sum over all pixels, weighted by how alike their features are; no weight is stored.
#pragma once

#include <cstdint>

namespace medaccel::propagation {

struct Problem {
    int64_t batch, pixels, channels, value_channels;
    double power;  // at least 1
    int threads;
};

// out_i = Σ_j max(cos(features_i, features_j), 0)^power · values_j
//   features [batch, pixels, channels]: normalised inside; a zero vector stays zero
//   values, out [batch, pixels, value_channels]
template <class T>
void forward(const T* features, const T* values, T* out, const Problem& problem);

//   grad like out; grad_features like features, grad_values like values; either may be null
// Every element of the results is written. Same bits whatever the number of threads.
template <class T>
void backward(const T* grad, const T* features, const T* values, T* grad_features, T* grad_values,
              const Problem& problem);

}  // namespace medaccel::propagation
