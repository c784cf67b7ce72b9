// SPDX-License-Identifier: Apache-2.0
// Instance normalisation on a GPU: what cuda.cu offers to the bindings. Nothing here waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "instance_norm.h"

namespace medaccel::instance_norm {

enum class Storage : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// `threads` of the problem means nothing here.
struct GpuProblem {
    Problem problem;
    Storage storage;  // of tensors; statistics and parameters are float, beside float64 double
    int device;
    void* stream;
};

// The gradient may be a slice of a larger tensor's channels, as a concatenation's backward pass gives it. Strides in
// elements; within a sample, voxels (channels last) or channels (else) are `pitch` apart.
struct Gradient {
    const void* data;
    int64_t batch_stride, pitch;
};

// In one launch a block does an instance, or some channels of a sample; in three, many blocks share it.
bool in_one_launch(const GpuProblem& problem);

// Scratch of one call, aligned to 16 bytes.
std::size_t forward_bytes(const GpuProblem& problem);
std::size_t backward_bytes(const GpuProblem& problem);

//   in, residual (or null), out: the tensor;   weight, bias: [channels], or null
//   mean, rstd: [batch][channels], written;    work: forward_bytes
void forward_gpu(const GpuProblem& problem, const void* in, const void* weight, const void* bias,
                 const void* residual, void* out, void* mean, void* rstd, void* work);

//   grad: as above; in, grad_in: the tensor; signs: the output or the residual, by `sign`, or null
//   grad_residual: the tensor, or null; grad_weight, grad_bias: [channels], both or neither null
//   work: backward_bytes
void backward_gpu(const GpuProblem& problem, const Gradient& grad, const void* in, const void* weight,
                  const void* bias, const void* signs, Sign sign, const void* mean, const void* rstd, void* grad_in,
                  void* grad_weight, void* grad_bias, void* grad_residual, void* work);

}  // namespace medaccel::instance_norm
