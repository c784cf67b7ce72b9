// SPDX-License-Identifier: Apache-2.0
// The diffusion step's CPU kernels for Python.
#include "../common/bindings.h"
#include "arguments.h"

namespace medaccel {
namespace diffusion_step {
namespace {

// coefficients: [kCoefficients][batch or 1].
void diffusion_step_forward(const std::vector<InputNumbers>& in, const std::vector<OutputNumbers>& out, int64_t batch,
                            int64_t size, const std::vector<double>& coefficients, const Clip& clip,
                            const std::tuple<uint64_t, uint64_t, uint32_t>& noise, int threads) {
    const auto columns = static_cast<int64_t>(coefficients.size()) / kCoefficients;
    forward(problem_of(batch, size, coefficients.data(), columns, clip, threads), forward_of(in, out),
            noise_of(noise));
}

void diffusion_step_backward(const std::vector<InputNumbers>& in, const std::vector<OutputNumbers>& out,
                             int64_t batch, int64_t size, const std::vector<double>& coefficients, const Clip& clip,
                             int threads) {
    const auto columns = static_cast<int64_t>(coefficients.size()) / kCoefficients;
    backward(problem_of(batch, size, coefficients.data(), columns, clip, threads), backward_of(in, out));
}

}  // namespace
}  // namespace diffusion_step

void bind_diffusion_step(py::module_& m) {
    m.def("diffusion_step_forward", &diffusion_step::diffusion_step_forward, Release());
    m.def("diffusion_step_backward", &diffusion_step::diffusion_step_backward, Release());
}

}  // namespace medaccel
