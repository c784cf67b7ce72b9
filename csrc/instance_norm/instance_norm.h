// SPDX-License-Identifier: Apache-2.0
// Instance normalisation, then optionally a residual's sum and a leaky ReLU, in two reads and one write.
#pragma once

#include <cstdint>

namespace medaccel::instance_norm {

// A tensor (batch, channels, *spatial) that is dense: channel by channel, or channels last.
struct Problem {
    int64_t batch, channels, voxels;
    bool channels_last;
    double eps;
    bool activate;
    double negative_slope;
    int threads;
};

// Says how the backward pass gets the sign of the activation's input.
enum class Sign : int {
    recompute = 0,      // there was no residual: from the input
    from_output = 1,    // the output has the sign (slope >= 0), and is kept by the next layer anyway
    with_residual = 2,  // from the input and the residual
};

//   in, residual (or null), out: the tensor;   weight, bias: [channels], or null
//   mean, rstd: [batch][channels], written
template <class T>
void forward(const T* in, const T* weight, const T* bias, const T* residual, T* out, T* mean, T* rstd,
             const Problem& problem);

//   grad, in, grad_in: the tensor; signs: the output or the residual, by `sign`, or null
//   grad_residual: the tensor, or null; grad_weight, grad_bias: [channels], or null
template <class T>
void backward(const T* grad, const T* in, const T* weight, const T* bias, const T* signs, Sign sign, const T* mean,
              const T* rstd, T* grad_in, T* grad_weight, T* grad_bias, T* grad_residual, const Problem& problem);

}  // namespace medaccel::instance_norm
