// SPDX-License-Identifier: Apache-2.0
// Cosines of the pixels of two views that show the same place, summed up pixel by pixel.
#pragma once

#include <cstdint>

namespace medaccel::pixel_consistency {

struct Problem {
    int64_t batch, queries, keys, channels, axes;
    int threads;
};

//   query [batch, queries, channels], key [batch, keys, channels]: normalised inside; a zero vector stays zero
//   query_coords [batch, queries, axes], key_coords [batch, keys, axes], radius [batch]
//   sums, counts [batch, queries]: Σ cos(query_i, key_j) over the keys j closer than the radius, and their number
template <class T, class U>
void forward(const T* query, const T* key, const U* query_coords, const U* key_coords, const U* radius, T* sums,
             T* counts, const Problem& problem);

//   grad [batch, queries], of the sums; grad_query like query, grad_key like key; either may be null
// Every element of the results is written. Same bits whatever the number of threads.
template <class T, class U>
void backward(const T* grad, const T* query, const T* key, const U* query_coords, const U* key_coords,
              const U* radius, T* grad_query, T* grad_key, const Problem& problem);

}  // namespace medaccel::pixel_consistency
