// SPDX-License-Identifier: Apache-2.0
// The diffusion step's GPU kernels for Python.
#include "../common/bindings.h"
#include "arguments.h"
#include "cuda.h"

namespace medaccel {
namespace diffusion_step {
namespace {

// coefficients: [kCoefficients][columns] in double at an address on the device, or 0: `shared` counts, one column.
GpuProblem gpu_problem_of(int64_t batch, int64_t size, std::uintptr_t coefficients, int64_t columns,
                          const std::vector<double>& shared, const Clip& clip, int device, std::uintptr_t stream) {
    GpuProblem p{problem_of(batch, size, address<const double>(coefficients), columns, clip, 1),
                 {},
                 device,
                 address<void>(stream)};
    for (int i = 0; !coefficients && i < kCoefficients; ++i) p.shared[i] = shared.at(i);
    return p;
}

// device_noise: seed, offset and sample_offset as int64 on the device, or 0: `noise` counts.
void diffusion_step_forward(const std::vector<InputNumbers>& in, const std::vector<OutputNumbers>& out, int64_t batch,
                            int64_t size, std::uintptr_t coefficients, int64_t columns,
                            const std::vector<double>& shared, const Clip& clip,
                            const std::tuple<uint64_t, uint64_t, uint32_t>& noise, std::uintptr_t device_noise,
                            int device, std::uintptr_t stream) {
    forward_gpu(gpu_problem_of(batch, size, coefficients, columns, shared, clip, device, stream), forward_of(in, out),
                noise_of(noise), address<const int64_t>(device_noise));
}

void diffusion_step_backward(const std::vector<InputNumbers>& in, const std::vector<OutputNumbers>& out,
                             int64_t batch, int64_t size, std::uintptr_t coefficients, int64_t columns,
                             const std::vector<double>& shared, const Clip& clip, int device, std::uintptr_t stream) {
    backward_gpu(gpu_problem_of(batch, size, coefficients, columns, shared, clip, device, stream),
                 backward_of(in, out));
}

}  // namespace
}  // namespace diffusion_step

void bind_diffusion_step_cuda(py::module_& m) {
    m.def("diffusion_step_forward", &diffusion_step::diffusion_step_forward);
    m.def("diffusion_step_backward", &diffusion_step::diffusion_step_backward);
}

}  // namespace medaccel
