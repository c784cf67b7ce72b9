// SPDX-License-Identifier: Apache-2.0
// Converts elements between their form in a GPU's memory and the arithmetic's.
#pragma once

#include "cuda_portable.h"

namespace medaccel {

__device__ inline float to_compute(float v) { return v; }
__device__ inline double to_compute(double v) { return v; }
__device__ inline float to_compute(__half v) { return __half2float(v); }
__device__ inline float to_compute(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ T to_storage(float v);
template <>
__device__ inline float to_storage<float>(float v) {
    return v;
}
template <>
__device__ inline double to_storage<double>(float v) {
    return v;
}
template <>
__device__ inline __half to_storage<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 to_storage<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
template <class T>
__device__ inline T to_storage(double v) {
    return static_cast<T>(v);
}

// Four neighbours, moved in one instruction where the address allows.
template <class T>
struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) Quad {
    T v[4];
};

}  // namespace medaccel
