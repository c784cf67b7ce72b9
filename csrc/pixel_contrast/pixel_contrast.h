// SPDX-License-Identifier: Apache-2.0
// Contrast between the pixels of two views: log-sum-exps over all pairs, of which none is stored.
#pragma once

#include <cstdint>

namespace medaccel::pixel_contrast {

struct Problem {
    int64_t batch, queries, keys, channels, axes;
    double temperature;
    int threads;
    bool cull = true;  // whether blocks of pixels that are too far apart are skipped: the same bits, sooner
};

// With s_ij = cos(query_i, key_j) / temperature and P(i) the keys closer than the sample's radius:
// loss_i = log Σ_j exp(s_ij) − log Σ_{j ∈ P(i)} exp(s_ij), and 0 where P(i) is empty.
//   query [batch, queries, channels], key [batch, keys, channels]: normalised inside; a zero vector stays zero
//   query_coords [batch, queries, axes], key_coords [batch, keys, axes], radius [batch]
//   loss, lse, positive_lse [batch, queries]: the latter two in base 2; 0 and −∞ where P(i) is empty
template <class T, class U>
void forward(const T* query, const T* key, const U* query_coords, const U* key_coords, const U* radius, T* loss,
             T* lse, T* positive_lse, const Problem& problem);

//   grad [batch, queries]; lse and positive_lse as `forward` wrote them
//   grad_query like query, grad_key like key; either may be null
// Every element of the results is written. Same bits whatever the number of threads.
template <class T, class U>
void backward(const T* grad, const T* query, const T* key, const U* query_coords, const U* key_coords,
              const U* radius, const T* lse, const T* positive_lse, T* grad_query, T* grad_key,
              const Problem& problem);

}  // namespace medaccel::pixel_contrast
