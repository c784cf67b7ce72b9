// SPDX-License-Identifier: Apache-2.0
// The GPU kernels' Python module, the counterpart of module.cpp: `_cuda`, built by nvcc, and the tests' `_emulated`,
// built by g++ from the same .cu files. The interpreter's lock is held: a launch only queues work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "diffusion_step/arguments.h"
#include "diffusion_step/cuda.h"
#include "gaussian/cuda.h"
#include "probe/probe.h"
#ifdef MEDACCEL_EMULATED
#include "common/emulation/harness.h"
#endif

namespace py = pybind11;

namespace {

using medaccel::gaussian::GpuCall;
using Pair = std::array<int64_t, 2>;
using Triple = std::array<int64_t, 3>;

template <class T>
T* address(std::uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

// sigma: σ in double on the device (z, y, x), or 0: host_sigma counts, and max_radius is theirs.
void gaussian_filter(std::uintptr_t in, std::uintptr_t out, int storage, const Pair& outer, const Triple& size,
                     const Pair& in_stride, const Pair& out_stride, std::uintptr_t sigma,
                     const std::array<double, 3>& host_sigma, double truncated, int approx, int border,
                     bool normalize, bool adjoint, int derivative_axis, std::uintptr_t workspace, int max_radius,
                     const std::array<std::uintptr_t, 2>& temporary, int device, std::uintptr_t stream) {
    using namespace medaccel::gaussian;
    medaccel::gaussian::filter_gpu({address<void>(in),
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
                                    address<void>(stream)});
}

// coefficients: [kCoefficients][columns] in double at an address on the device, or 0: `shared` counts, one column.
medaccel::diffusion_step::GpuProblem diffusion_problem(int64_t batch, int64_t size, std::uintptr_t coefficients,
                                                       int64_t columns, const std::vector<double>& shared,
                                                       const medaccel::diffusion_step::Clip& clip, int device,
                                                       std::uintptr_t stream) {
    using namespace medaccel::diffusion_step;
    GpuProblem p{problem_of(batch, size, address<const double>(coefficients), columns, clip, 1),
                 {},
                 device,
                 address<void>(stream)};
    for (int i = 0; !coefficients && i < kCoefficients; ++i) p.shared[i] = shared.at(i);
    return p;
}

// device_noise: seed, offset and sample_offset as int64 on the device, or 0: `noise` counts.
void diffusion_step_forward(const std::vector<medaccel::diffusion_step::InputNumbers>& in,
                            const std::vector<medaccel::diffusion_step::OutputNumbers>& out, int64_t batch,
                            int64_t size, std::uintptr_t coefficients, int64_t columns,
                            const std::vector<double>& shared, const medaccel::diffusion_step::Clip& clip,
                            const std::tuple<uint64_t, uint64_t, uint32_t>& noise, std::uintptr_t device_noise,
                            int device, std::uintptr_t stream) {
    using namespace medaccel::diffusion_step;
    forward_gpu(diffusion_problem(batch, size, coefficients, columns, shared, clip, device, stream),
                forward_of(in, out), noise_of(noise), address<const int64_t>(device_noise));
}

void diffusion_step_backward(const std::vector<medaccel::diffusion_step::InputNumbers>& in,
                             const std::vector<medaccel::diffusion_step::OutputNumbers>& out, int64_t batch,
                             int64_t size, std::uintptr_t coefficients, int64_t columns,
                             const std::vector<double>& shared, const medaccel::diffusion_step::Clip& clip,
                             int device, std::uintptr_t stream) {
    using namespace medaccel::diffusion_step;
    backward_gpu(diffusion_problem(batch, size, coefficients, columns, shared, clip, device, stream),
                 backward_of(in, out));
}

}  // namespace

PYBIND11_MODULE(MEDACCEL_MODULE, m) {
    m.attr("architectures") = MEDACCEL_CUDA_ARCHS;
    m.attr("cuda_version") = MEDACCEL_CUDA_VERSION;
    m.attr("max_device_radius") = medaccel::gaussian::kMaxDeviceRadius;
    m.attr("fused_radius") = medaccel::gaussian::kFusedReach;
    m.attr("dot_blocks") = medaccel::gaussian::kDotBlocks;
    m.def("device_count", [] {
        const auto found = medaccel::probe::device_count();
        return py::make_tuple(found.count, found.problem);
    });
    m.def("running_architecture", &medaccel::probe::running_architecture);
    m.def("gaussian_radius", &medaccel::gaussian::radius_of);
    m.def("gaussian_workspace_bytes", &medaccel::gaussian::workspace_bytes);
    m.def("gaussian_filter", &gaussian_filter);
    m.def("diffusion_step_forward", &diffusion_step_forward);
    m.def("diffusion_step_backward", &diffusion_step_backward);
    m.def("dot", [](std::uintptr_t a, std::uintptr_t b, int64_t n, int storage, std::uintptr_t partial,
                    std::uintptr_t result, int device, std::uintptr_t stream) {
        medaccel::gaussian::dot_gpu(address<void>(a), address<void>(b), n,
                                    static_cast<medaccel::gaussian::Storage>(storage), address<double>(partial),
                                    address<double>(result), device, address<void>(stream));
    });
#ifdef MEDACCEL_EMULATED
    namespace emulation = medaccel::emulation;
    m.def("reset", &emulation::reset);
    m.def("set_device_count", &emulation::set_device_count);
    m.def("adopt", [](std::uintptr_t begin, std::size_t bytes, int device) {
        emulation::adopt_memory(address<void>(begin), bytes, device);
    });
    m.def("disown", [](std::uintptr_t begin) { emulation::disown_memory(address<void>(begin)); });
    m.def("inject_earlier_error", [] { emulation::inject_earlier_error(cudaErrorIllegalAddress); });
    m.def("fail_next_launch", [] { emulation::fail_next_launch(cudaErrorInvalidConfiguration); });
    m.def("synchronizations", &emulation::synchronizations);
    m.def("launches", [] {
        py::list all;
        for (const auto& launch : emulation::take_launches())
            all.append(py::make_tuple(launch.kernel, launch.device, launch.grid.x * launch.grid.y * launch.grid.z));
        return all;
    });
#endif
}
