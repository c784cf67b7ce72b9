// SPDX-License-Identifier: Apache-2.0
// The CUDA language and the device functions that medaccel's kernels use. A function that is missing here does not
// compile.
#pragma once

#include <math.h>

#include <cstdint>
#include <type_traits>

#include "execution.h"
#include "half_types.h"
#include "runtime_api.h"

// glibc happens to declare functions of these names, with other results than the GPU's.
#pragma GCC poison __cosf __exp10f __expf __log10f __log2f __logf __powf __sincosf __sinf __tanf

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (*::medaccel::emulation::inside_kernel().thread_index)
#define blockIdx (::medaccel::emulation::inside_kernel().block_index)
#define blockDim (::medaccel::emulation::inside_kernel().block)
#define gridDim (::medaccel::emulation::inside_kernel().grid)
inline constexpr int warpSize = 32;

// ---- Barriers and fences ----

inline void __syncthreads(MEDACCEL_EMU_SITE) { medaccel::emulation::block_barrier(site); }

namespace medaccel::emulation {

template <class T>
T warp_operation(WarpOperation operation, unsigned mask, T value, int argument, int width, Site site) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "CUDA shuffles 32- and 64-bit numbers");
    WarpRequest request{operation, mask, 0, argument, width};
    std::memcpy(&request.value, &value, sizeof(T));
    const std::uint64_t bits = warp_operation(request, site);
    T result;
    std::memcpy(&result, &bits, sizeof(T));
    return result;
}

// Minimum and maximum compare 64-bit signed numbers, so 32-bit ones are widened first.
template <class T>
T warp_reduction(WarpOperation operation, unsigned mask, T value, Site site) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "CUDA reduces int and unsigned");
    return static_cast<T>(warp_operation(operation, mask, static_cast<long long>(value), 0, 32, site));
}

template <class T, class Function>
T atomic_update(T* address, Function function) {
    using Word = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;
    before_atomic(address);
    auto* word = reinterpret_cast<Word*>(address);
    Word old = __atomic_load_n(word, __ATOMIC_RELAXED), next;
    do {
        next = bit_cast<Word>(static_cast<T>(function(bit_cast<T>(old))));
    } while (!__atomic_compare_exchange_n(word, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return bit_cast<T>(old);
}

template <class T, class... Allowed>
inline constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);
template <class T>
using Plain = std::common_type_t<T>;  // keeps a parameter from taking part in deduction

}  // namespace medaccel::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu, MEDACCEL_EMU_SITE) {
    medaccel::emulation::warp_operation(medaccel::emulation::WarpOperation::sync, mask, 0, 0, 32, site);
}

inline void __threadfence() { medaccel::emulation::fence(); }

// ---- Warps ----

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_operation(medaccel::emulation::WarpOperation::shuffle, mask, value, lane, width,
                                               site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_operation(medaccel::emulation::WarpOperation::shuffle_up, mask, value,
                                               static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_operation(medaccel::emulation::WarpOperation::shuffle_down, mask, value,
                                               static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_operation(medaccel::emulation::WarpOperation::shuffle_xor, mask, value, lanes,
                                               width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_operation(medaccel::emulation::WarpOperation::ballot, mask,
                                               unsigned{predicate != 0}, 0, 32, site);
}
inline int __any_sync(unsigned mask, int predicate, MEDACCEL_EMU_SITE) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MEDACCEL_EMU_SITE) {
    return __ballot_sync(mask, !predicate, site) == 0;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_reduction(medaccel::emulation::WarpOperation::add, mask, value, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_reduction(medaccel::emulation::WarpOperation::minimum, mask, value, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, MEDACCEL_EMU_SITE) {
    return medaccel::emulation::warp_reduction(medaccel::emulation::WarpOperation::maximum, mask, value, site);
}

// ---- Atomics, for the types that CUDA has them for; 64-bit integers are `unsigned long long` there ----

template <class T>
T atomicAdd(T* address, medaccel::emulation::Plain<T> value) {
    static_assert(medaccel::emulation::one_of<T, int, unsigned, unsigned long long, float, double>,
                  "no such atomicAdd");
    return medaccel::emulation::atomic_update(address, [=](T old) {
        if constexpr (std::is_same_v<T, int>) {  // wraps around, as on the GPU
            return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
        } else {
            return old + value;
        }
    });
}
template <class T>
T atomicMin(T* address, medaccel::emulation::Plain<T> value) {
    static_assert(medaccel::emulation::one_of<T, int, unsigned, long long, unsigned long long>, "no such atomicMin");
    return medaccel::emulation::atomic_update(address, [=](T old) { return old < value ? old : value; });
}
template <class T>
T atomicMax(T* address, medaccel::emulation::Plain<T> value) {
    static_assert(medaccel::emulation::one_of<T, int, unsigned, long long, unsigned long long>, "no such atomicMax");
    return medaccel::emulation::atomic_update(address, [=](T old) { return old > value ? old : value; });
}
template <class T>
T atomicExch(T* address, medaccel::emulation::Plain<T> value) {
    static_assert(medaccel::emulation::one_of<T, int, unsigned, unsigned long long, float>, "no such atomicExch");
    return medaccel::emulation::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, medaccel::emulation::Plain<T> expected, medaccel::emulation::Plain<T> value) {
    static_assert(medaccel::emulation::one_of<T, int, unsigned, unsigned long long>, "no such atomicCAS");
    return medaccel::emulation::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

// ---- Loads and stores with a cache hint: plain ones here ----

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}

// ---- Arithmetic that is exact, or rounds the same here and on the GPU ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline float __int_as_float(int x) { return medaccel::emulation::bit_cast<float>(x); }
inline int __float_as_int(float x) { return medaccel::emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return medaccel::emulation::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return medaccel::emulation::bit_cast<unsigned>(x); }

// As in CUDA, the result for a number and a NaN is the number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
#define MEDACCEL_EMU_MIN_MAX(type)                            \
    inline type min(type a, type b) { return b < a ? b : a; } \
    inline type max(type a, type b) { return a < b ? b : a; }
MEDACCEL_EMU_MIN_MAX(int)
MEDACCEL_EMU_MIN_MAX(unsigned)
MEDACCEL_EMU_MIN_MAX(long)
MEDACCEL_EMU_MIN_MAX(unsigned long)
MEDACCEL_EMU_MIN_MAX(long long)
MEDACCEL_EMU_MIN_MAX(unsigned long long)
#undef MEDACCEL_EMU_MIN_MAX
