// SPDX-License-Identifier: Apache-2.0
// Shifted-window attention on a channels-last map that is neither rolled, padded nor partitioned.
#pragma once

#include <array>
#include <cstdint>

namespace medaccel::window_attention {

using Size3 = std::array<int64_t, 3>;  // z, y, x; maps of fewer axes have leading ones

struct Problem {
    int64_t batch;
    Size3 sizes, window, shift;
    int64_t heads, head_dim, table_rows;
    double scale;
    double dropout_p;
    uint32_t dropout_threshold;  // a weight is dropped where its random word is below this
    uint64_t dropout_seed;
    int threads;

    int64_t channels() const { return heads * head_dim; }
    int64_t tokens() const { return window[0] * window[1] * window[2]; }
    Size3 grid() const {
        Size3 g;
        for (int a = 0; a < 3; ++a) g[a] = (sizes[a] + window[a] - 1) / window[a];
        return g;
    }
    int64_t windows() const {
        const Size3 g = grid();
        return g[0] * g[1] * g[2];
    }
};

//   qkv:     [batch, *sizes, 3 · heads · head_dim], q, k and v side by side
//   table:   [table_rows, heads], index: [tokens, tokens], within the table (the caller has checked)
//   pad_qkv: [3 · heads · head_dim], a padded token's q, k and v; null: zeros
//   out:     [batch, *sizes, heads · head_dim]
//   lse:     [batch, windows, heads, tokens], base-2 log-sum-exp of each query's scores; 0 where the query is padding
template <class T>
void forward(const T* qkv, const T* table, const int32_t* index, const T* pad_qkv, T* out, T* lse,
             const Problem& problem);

//   grad, out:  [batch, *sizes, heads · head_dim]; lse as `forward` wrote it
//   grad_qkv:   like qkv; grad_table: like table, or null; grad_pad: like pad_qkv, or null
// Every element of the results is written. Same bits whatever the number of threads.
template <class T>
void backward(const T* grad, const T* qkv, const T* table, const int32_t* index, const T* pad_qkv, const T* out,
              const T* lse, T* grad_qkv, T* grad_table, T* grad_pad, const Problem& problem);

}  // namespace medaccel::window_attention
