// SPDX-License-Identifier: Apache-2.0
// Shapes and strides as the Python side hands them over: plain 64-bit integers, in elements, never bytes.
#pragma once

#include <cstdint>
#include <vector>

// Marks the few functions that a CPU kernel and a CUDA kernel share.
#ifdef __CUDACC__
#define MEDACCEL_HOST_DEVICE __host__ __device__
#else
#define MEDACCEL_HOST_DEVICE
#endif

namespace medaccel {

using Shape = std::vector<int64_t>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t element_count(const Shape& shape) {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
}

}  // namespace medaccel
