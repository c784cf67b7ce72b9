// SPDX-License-Identifier: Apache-2.0
// The inner product of two volumes on a GPU, in which the gradient to σ ends. Part of cuda.cu.
//
// dot_parts adds up in kDotBlocks blocks, dot_total adds up theirs: no atomics, so the order is always the same.
#pragma once

#include "../common/cuda_portable.h"
#include "../common/cuda_storage.h"

namespace medaccel::gaussian {
namespace {

constexpr int kDotThreads = 256;

__device__ inline double block_sum(double value) {
    SHARED(double, sums, [kDotThreads]);
    sums[threadIdx.x] = value;
    for (int half = kDotThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[0];
}

template <class T>
__global__ void __launch_bounds__(kDotThreads)
    dot_parts(const T* __restrict__ a, const T* __restrict__ b, int64_t n, double* partial) {
    double sum = 0;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
        sum = fma(static_cast<double>(to_compute(a[i])), static_cast<double>(to_compute(b[i])), sum);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kDotThreads) dot_total(const double* partial, double* result) {
    const double sum = block_sum(partial[threadIdx.x]);
    if (threadIdx.x == 0) *result = sum;
}

}  // namespace
}  // namespace medaccel::gaussian
