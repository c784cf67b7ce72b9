// SPDX-License-Identifier: Apache-2.0
// Instance norm's GPU kernels for Python.
#include "../common/bindings.h"
#include "cuda.h"

namespace medaccel {
namespace instance_norm {
namespace {

GpuProblem problem_of(int storage, int64_t batch, int64_t channels, int64_t voxels, bool channels_last, double eps,
                      bool activate, double negative_slope, int device, std::uintptr_t stream) {
    return {{batch, channels, voxels, channels_last, eps, activate, negative_slope, 1},
            static_cast<Storage>(storage),
            device,
            address<void>(stream)};
}

// Bytes of a call's scratch.
std::size_t instance_norm_bytes(bool backward, int storage, int64_t batch, int64_t channels, int64_t voxels,
                                bool channels_last) {
    const auto p = problem_of(storage, batch, channels, voxels, channels_last, 0, false, 0, 0, 0);
    return backward ? backward_bytes(p) : forward_bytes(p);
}

// Addresses may be 0 where cuda.h allows null.
void instance_norm_forward(std::uintptr_t in, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                           std::uintptr_t out, std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t work,
                           int storage, int64_t batch, int64_t channels, int64_t voxels, bool channels_last,
                           double eps, bool activate, double negative_slope, int device, std::uintptr_t stream) {
    forward_gpu(
        problem_of(storage, batch, channels, voxels, channels_last, eps, activate, negative_slope, device, stream),
        address<void>(in), address<void>(weight), address<void>(bias), address<void>(residual), address<void>(out),
        address<void>(mean), address<void>(rstd), address<void>(work));
}

void instance_norm_backward(std::uintptr_t grad, int64_t grad_batch_stride, int64_t grad_pitch, std::uintptr_t in,
                            std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t signs, int sign,
                            std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t grad_in,
                            std::uintptr_t grad_weight, std::uintptr_t grad_bias, std::uintptr_t grad_residual,
                            std::uintptr_t work, int storage, int64_t batch, int64_t channels, int64_t voxels,
                            bool channels_last, double eps, bool activate, double negative_slope, int device,
                            std::uintptr_t stream) {
    backward_gpu(
        problem_of(storage, batch, channels, voxels, channels_last, eps, activate, negative_slope, device, stream),
        {address<void>(grad), grad_batch_stride, grad_pitch}, address<void>(in), address<void>(weight),
        address<void>(bias), address<void>(signs), static_cast<Sign>(sign), address<void>(mean), address<void>(rstd),
        address<void>(grad_in), address<void>(grad_weight), address<void>(grad_bias), address<void>(grad_residual),
        address<void>(work));
}

}  // namespace
}  // namespace instance_norm

void bind_instance_norm_cuda(py::module_& m) {
    m.def("instance_norm_bytes", &instance_norm::instance_norm_bytes);
    m.def("instance_norm_forward", &instance_norm::instance_norm_forward);
    m.def("instance_norm_backward", &instance_norm::instance_norm_backward);
}

}  // namespace medaccel
