// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter's GPU kernels for Python.
#include <array>

#include "../common/bindings.h"
#include "cuda.h"

namespace medaccel {
namespace gaussian {
namespace {

using Pair = std::array<int64_t, 2>;
using Triple = std::array<int64_t, 3>;

// sigma: σ in double on the device (z, y, x), or 0: host_sigma counts, and max_radius is theirs.
void gaussian_filter(std::uintptr_t in, std::uintptr_t out, int storage, const Pair& outer, const Triple& size,
                     const Pair& in_stride, const Pair& out_stride, std::uintptr_t sigma,
                     const std::array<double, 3>& host_sigma, double truncated, int approx, int border,
                     bool normalize, bool adjoint, int derivative_axis, std::uintptr_t workspace, int max_radius,
                     const std::array<std::uintptr_t, 2>& temporary, int device, std::uintptr_t stream,
                     int64_t chunks) {
    filter_gpu({address<void>(in),
                address<void>(out),
                outer[0],
                outer[1],
                {in_stride[0], in_stride[1]},
                {out_stride[0], out_stride[1]},
                {size[0], size[1], size[2]},
                static_cast<Storage>(storage),
                address<double>(sigma),
                {host_sigma[0], host_sigma[1], host_sigma[2]},
                truncated,
                static_cast<Approx>(approx),
                static_cast<Border>(border),
                normalize,
                adjoint,
                derivative_axis,
                address<void>(workspace),
                max_radius,
                {address<void>(temporary[0]), address<void>(temporary[1])},
                device,
                address<void>(stream),
                chunks});
}

void dot(std::uintptr_t a, std::uintptr_t b, int64_t n, int storage, std::uintptr_t partial, std::uintptr_t result,
         int device, std::uintptr_t stream) {
    dot_gpu(address<void>(a), address<void>(b), n, static_cast<Storage>(storage), address<double>(partial),
            address<double>(result), device, address<void>(stream));
}

}  // namespace
}  // namespace gaussian

void bind_gaussian_cuda(py::module_& m) {
    m.attr("max_device_radius") = gaussian::kMaxDeviceRadius;
    m.attr("fused_radius") = gaussian::kFusedReach;
    m.attr("dot_blocks") = gaussian::kDotBlocks;
    m.attr("march_tile") = gaussian::kMarchTile;
    m.def("gaussian_radius", &gaussian::radius_of);
    m.def("gaussian_plan", [](int64_t volumes, const gaussian::Triple& size, int reach, int processors) {
        const auto plan = gaussian::plan_march(volumes, size.data(), reach, processors);
        return std::pair<int64_t, int64_t>{plan.chunks, plan.blocks};
    });
    m.def("gaussian_workspace_bytes", &gaussian::workspace_bytes);
    m.def("gaussian_filter", &gaussian::gaussian_filter);
    m.def("dot", &gaussian::dot);
}

}  // namespace medaccel
