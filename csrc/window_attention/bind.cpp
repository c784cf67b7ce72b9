// SPDX-License-Identifier: Apache-2.0
// Shifted-window attention's CPU kernels for Python.
#include "../common/bindings.h"
#include "window_attention.h"

namespace medaccel {
namespace window_attention {
namespace {

Problem problem_of(const Shape& size, int64_t heads, int64_t table_rows, const Shape& window, const Shape& shift,
                   double scale, double dropout_p, uint32_t dropout_threshold, std::uintptr_t dropout_seed,
                   int threads) {
    Problem p{};
    p.batch = size[0];
    for (int axis = 0; axis < 3; ++axis)
        p.sizes[axis] = size[1 + axis], p.window[axis] = window[axis], p.shift[axis] = shift[axis];
    p.heads = heads;
    p.head_dim = size[4] / (3 * heads);
    p.table_rows = table_rows;
    p.scale = scale;
    p.dropout_p = dropout_p;
    p.dropout_threshold = dropout_threshold;
    if (dropout_seed) p.dropout_seed = static_cast<uint64_t>(*address<const int64_t>(dropout_seed));
    p.threads = threads;
    return p;
}

// size: (B, z, y, x, 3·C); dropout_seed: the address of an int64, or 0. Other addresses may be 0 where
// window_attention.h allows null.
void window_attention_forward(std::uintptr_t qkv, std::uintptr_t table, std::uintptr_t index, std::uintptr_t pad,
                              std::uintptr_t out, std::uintptr_t lse, int dtype, const Shape& size, int64_t heads,
                              int64_t table_rows, const Shape& window, const Shape& shift, double scale,
                              double dropout_p, uint32_t dropout_threshold, std::uintptr_t dropout_seed,
                              int threads) {
    const auto p = problem_of(size, heads, table_rows, window, shift, scale, dropout_p, dropout_threshold,
                              dropout_seed, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        forward(address<const T>(qkv), address<const T>(table), address<const int32_t>(index), address<const T>(pad),
                address<T>(out), address<T>(lse), p);
    });
}

void window_attention_backward(std::uintptr_t grad, std::uintptr_t qkv, std::uintptr_t table, std::uintptr_t index,
                               std::uintptr_t pad, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t grad_qkv,
                               std::uintptr_t grad_table, std::uintptr_t grad_pad, int dtype, const Shape& size,
                               int64_t heads, int64_t table_rows, const Shape& window, const Shape& shift,
                               double scale, double dropout_p, uint32_t dropout_threshold,
                               std::uintptr_t dropout_seed, int threads) {
    const auto p = problem_of(size, heads, table_rows, window, shift, scale, dropout_p, dropout_threshold,
                              dropout_seed, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        backward(address<const T>(grad), address<const T>(qkv), address<const T>(table),
                 address<const int32_t>(index), address<const T>(pad), address<const T>(out), address<const T>(lse),
                 address<T>(grad_qkv), address<T>(grad_table), address<T>(grad_pad), p);
    });
}

}  // namespace
}  // namespace window_attention

void bind_window_attention(py::module_& m) {
    m.def("window_attention_forward", &window_attention::window_attention_forward, Release());
    m.def("window_attention_backward", &window_attention::window_attention_backward, Release());
}

}  // namespace medaccel
