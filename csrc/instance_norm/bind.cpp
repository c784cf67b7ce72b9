// SPDX-License-Identifier: Apache-2.0
// Instance norm's CPU kernels for Python.
#include "../common/bindings.h"
#include "instance_norm.h"

namespace medaccel {
namespace instance_norm {
namespace {

Problem problem_of(int64_t batch, int64_t channels, int64_t voxels, bool channels_last, double eps, bool activate,
                   double negative_slope, int threads) {
    return {batch, channels, voxels, channels_last, eps, activate, negative_slope, threads};
}

// Addresses may be 0 where instance_norm.h allows null.
void instance_norm_forward(std::uintptr_t in, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                           std::uintptr_t out, std::uintptr_t mean, std::uintptr_t rstd, int dtype, int64_t batch,
                           int64_t channels, int64_t voxels, bool channels_last, double eps, bool activate,
                           double negative_slope, int threads) {
    const auto p = problem_of(batch, channels, voxels, channels_last, eps, activate, negative_slope, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        forward(address<const T>(in), address<const T>(weight), address<const T>(bias), address<const T>(residual),
                address<T>(out), address<T>(mean), address<T>(rstd), p);
    });
}

void instance_norm_backward(std::uintptr_t grad, std::uintptr_t in, std::uintptr_t weight, std::uintptr_t bias,
                            std::uintptr_t signs, int sign, std::uintptr_t mean, std::uintptr_t rstd,
                            std::uintptr_t grad_in, std::uintptr_t grad_weight, std::uintptr_t grad_bias,
                            std::uintptr_t grad_residual, int dtype, int64_t batch, int64_t channels, int64_t voxels,
                            bool channels_last, double eps, bool activate, double negative_slope, int threads) {
    const auto p = problem_of(batch, channels, voxels, channels_last, eps, activate, negative_slope, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        backward(address<const T>(grad), address<const T>(in), address<const T>(weight), address<const T>(bias),
                 address<const T>(signs), static_cast<Sign>(sign), address<const T>(mean), address<const T>(rstd),
                 address<T>(grad_in), address<T>(grad_weight), address<T>(grad_bias), address<T>(grad_residual), p);
    });
}

}  // namespace
}  // namespace instance_norm

void bind_instance_norm(py::module_& m) {
    m.def("instance_norm_forward", &instance_norm::instance_norm_forward, Release());
    m.def("instance_norm_backward", &instance_norm::instance_norm_backward, Release());
}

}  // namespace medaccel
