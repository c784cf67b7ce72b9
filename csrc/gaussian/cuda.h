// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter on a GPU: what cuda.cu offers to the bindings. Nothing here waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gaussian.h"

namespace medaccel::gaussian {

// σ that lies on the device may reach this far; beyond it, or where it is negative or NaN, the output is NaN: the
// host cannot refuse it without waiting. (σ known to the host is checked there and may reach any radius.)
constexpr int kMaxDeviceRadius = 2048;

// Up to this radius one pass filters all three axes, in fp32 arithmetic.
constexpr int kFusedReach = 8;

enum class Storage : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// One call. Spatial axes are dense in C order; missing ones have size 1. Sizes and strides in elements.
struct GpuCall {
    const void* in;
    void* out;
    int64_t batch, channels;
    int64_t in_stride[2], out_stride[2];  // of batch and channel
    int64_t size[3];                      // z, y, x
    Storage storage;
    const double* device_sigma;  // [3] z, y, x on the device; or null: host_sigma counts
    double host_sigma[3];
    double truncated;
    Approx approx;
    Border border;
    bool normalize;
    bool adjoint;
    int derivative_axis;  // 0, 1, 2: that axis is filtered with ∂taps/∂σ; −1: none
    void* workspace;      // workspace_bytes(max_radius)
    int max_radius;       // of the σ, where the host knows them; kMaxDeviceRadius where not
    void* temporary[2];  // one volume each in the arithmetic's type, for radii beyond the fused kernels'; may be null
                         // where `needs_temporaries` is false
    int device;
    void* stream;
};

std::size_t workspace_bytes(int max_radius);

void filter_gpu(const GpuCall& call);

// *result = Σ a[i] · b[i] in double, i < n, in an order that n alone decides. partial: kDotBlocks doubles.
constexpr int kDotBlocks = 256;
void dot_gpu(const void* a, const void* b, int64_t n, Storage storage, double* partial, double* result, int device,
             void* stream);

}  // namespace medaccel::gaussian
