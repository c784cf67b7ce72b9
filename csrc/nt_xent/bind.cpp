// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of NT-Xent and InfoNCE for Python.
#include "../common/bindings.h"
#include "nt_xent.h"

namespace medaccel {
namespace nt_xent {
namespace {

Problem problem_of(const Shape& size, int64_t self, double temperature, int threads) {
    return {size[0], size[1], size[2], size[3], self, temperature, threads};
}

// size: (B, N, M, C); self: see nt_xent.h.
void similarity_lse_forward(std::uintptr_t query, std::uintptr_t key, std::uintptr_t lse, int dtype,
                            const Shape& size, int64_t self, double temperature, int threads) {
    const auto p = problem_of(size, self, temperature, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        forward(address<const T>(query), address<const T>(key), address<T>(lse), p);
    });
}

void similarity_lse_backward(std::uintptr_t grad, std::uintptr_t query, std::uintptr_t key, std::uintptr_t lse,
                             std::uintptr_t grad_query, std::uintptr_t grad_key, int dtype, const Shape& size,
                             int64_t self, double temperature, int threads) {
    const auto p = problem_of(size, self, temperature, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        backward(address<const T>(grad), address<const T>(query), address<const T>(key), address<const T>(lse),
                 address<T>(grad_query), address<T>(grad_key), p);
    });
}

}  // namespace
}  // namespace nt_xent

void bind_nt_xent(py::module_& m) {
    m.def("similarity_lse_forward", &nt_xent::similarity_lse_forward, Release());
    m.def("similarity_lse_backward", &nt_xent::similarity_lse_backward, Release());
}

}  // namespace medaccel
