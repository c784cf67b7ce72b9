// SPDX-License-Identifier: Apache-2.0
// Log-sum-exps of cosine similarities over all pairs, of which none is stored: NT-Xent's and InfoNCE's sums.
#pragma once

#include <cstdint>

namespace medaccel::nt_xent {

struct Problem {
    int64_t batch, queries, keys, channels;
    int64_t self;  // key i + self of query i is left out, where self ≥ 0
    double temperature;
    int threads;
};

// With s_ij = cos(query_i, key_j) / temperature: lse_i = log Σ_j exp(s_ij), in base 2.
//   query [batch, queries, channels], key [batch, keys, channels]: normalised inside; a zero vector stays zero
//   lse [batch, queries]
template <class T>
void forward(const T* query, const T* key, T* lse, const Problem& problem);

//   grad [batch, queries], of the natural logarithm; lse as `forward` wrote it
//   grad_query like query, grad_key like key; either may be null
// Every element of the results is written. Same bits whatever the number of threads.
template <class T>
void backward(const T* grad, const T* query, const T* key, const T* lse, T* grad_query, T* grad_key,
              const Problem& problem);

}  // namespace medaccel::nt_xent
