// SPDX-License-Identifier: Apache-2.0
// The diffusion step on a GPU: what cuda.cu offers to the bindings. Nothing here waits for the device.
#pragma once

#include "diffusion_step.h"

namespace medaccel::diffusion_step {

// In a Problem for the GPU `coefficients` lie in the device's memory; or are null, and `shared` counts, by value.
struct GpuProblem {
    Problem problem;
    double shared[kCoefficients];
    int device;
    void* stream;
};

// device_noise: [3] seed, offset, sample_offset in the device's memory; or null: `noise` counts.
void forward_gpu(const GpuProblem& problem, const Forward& tensors, const Noise& noise, const int64_t* device_noise);
void backward_gpu(const GpuProblem& problem, const Backward& tensors);

}  // namespace medaccel::diffusion_step
