// SPDX-License-Identifier: Apache-2.0
// Pixel propagation's CPU kernels for Python.
#include "../common/bindings.h"
#include "propagation.h"

namespace medaccel {
namespace propagation {
namespace {

// size: (B, N, C, D)
void pixel_propagation_forward(std::uintptr_t features, std::uintptr_t values, std::uintptr_t out, int dtype,
                               const Shape& size, double power, int threads) {
    const Problem p{size[0], size[1], size[2], size[3], power, threads};
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        forward(address<const T>(features), address<const T>(values), address<T>(out), p);
    });
}

void pixel_propagation_backward(std::uintptr_t grad, std::uintptr_t features, std::uintptr_t values,
                                std::uintptr_t grad_features, std::uintptr_t grad_values, int dtype,
                                const Shape& size, double power, int threads) {
    const Problem p{size[0], size[1], size[2], size[3], power, threads};
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        backward(address<const T>(grad), address<const T>(features), address<const T>(values),
                 address<T>(grad_features), address<T>(grad_values), p);
    });
}

}  // namespace
}  // namespace propagation

void bind_propagation(py::module_& m) {
    m.def("pixel_propagation_forward", &propagation::pixel_propagation_forward, Release());
    m.def("pixel_propagation_backward", &propagation::pixel_propagation_backward, Release());
}

}  // namespace medaccel
