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

// A block of the fused kernels filters a square tile of this side, a chunk of planes long.
constexpr int kMarchTile = 32;

struct MarchPlan {
    int64_t chunks;  // of planes
    int64_t blocks;
};

// Cuts a volume so that the device's multiprocessors are busy. Each chunk costs 2 · reach planes more. A processor
// holds two blocks or more; one alone leaves about a third of the time unused, while it waits.
inline MarchPlan plan_march(int64_t volumes, const int64_t size[3], int reach, int processors) {
    const auto parts = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
    const int64_t columns = volumes * parts(size[1], kMarchTile) * parts(size[2], kMarchTile);
    const int64_t least = parts(columns, processors);
    MarchPlan best{1, columns};
    int64_t least_time = 0;
    for (int64_t each = least; each < least + 8; ++each) {  // blocks of a processor
        const int64_t most = each * processors / columns, chunks = most < size[0] ? most : size[0];
        const int64_t time = (each == 1 ? 3 : 2 * each) * (parts(size[0], chunks) + 2 * reach);
        if (least_time > 0 && time > least_time) continue;
        if (least_time > 0 && chunks == best.chunks) break;
        best = {chunks, columns * chunks};
        least_time = time;
    }
    return best;
}

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
    int64_t chunks = 0;  // of planes, 1 … size[0], for the fused kernels; 0: plan_march chooses. No bit depends on it
};

std::size_t workspace_bytes(int max_radius);

void filter_gpu(const GpuCall& call);

// *result = Σ a[i] · b[i] in double, i < n, in an order that n alone decides. partial: kDotBlocks doubles.
constexpr int kDotBlocks = 256;
void dot_gpu(const void* a, const void* b, int64_t n, Storage storage, double* partial, double* result, int device,
             void* stream);

}  // namespace medaccel::gaussian
