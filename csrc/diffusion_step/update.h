// SPDX-License-Identifier: Apache-2.0
// The update's arithmetic, for one element or a register of them: shared by the CPU's and the GPU's kernel.
#pragma once

#include "diffusion_step.h"

namespace medaccel::diffusion_step {

// Coefficients of one sample in the arithmetic's type. L: ScalarLane or VectorLane.
template <class L>
struct Update {
    using T = typename L::Element;
    using Real = typename L::Real;
    T value[kCoefficients];
    T low, high;
    bool clip;

    MEDACCEL_HOST_DEVICE Real times(Coefficient i) const { return L::all(value[i]); }

    MEDACCEL_HOST_DEVICE Real unclipped(Real x, Real m) const { return L::fma(times(kB), m, times(kA) * x); }

    // As torch.clamp: NaN stays NaN.
    MEDACCEL_HOST_DEVICE Real clipped(Real u) const {
        if (!clip) return u;
        const Real lower = L::all(low), upper = L::all(high);
        const Real raised = lower > u ? lower : u;
        return upper < raised ? upper : raised;
    }

    MEDACCEL_HOST_DEVICE Real next(Real x, Real m, Real x0) const {
        return L::fma(times(kC), x0, L::fma(times(kE), m, times(kD) * x));
    }

    // grad: of x′, 0 where the guide is kept; grad_x0: of x0.
    MEDACCEL_HOST_DEVICE void gradients(Real grad, Real grad_x0, Real u, Real& to_sample, Real& to_model) const {
        Real inner = L::fma(times(kC), grad, grad_x0);
        if (clip) {
            const Real none = L::all(T(0));
            inner = u < low ? none : inner;
            inner = u > high ? none : inner;
        }
        to_sample = L::fma(times(kA), inner, times(kD) * grad);
        to_model = L::fma(times(kB), inner, times(kE) * grad);
    }
};

}  // namespace medaccel::diffusion_step
