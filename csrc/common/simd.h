// SPDX-License-Identifier: Apache-2.0
// One register of T in the instruction set that this file is compiled for: 64, 32 or 16 bytes.
//
// GCC's and Clang's vector types do the arithmetic; only the fused multiply-add needs intrinsics, because
// -ffp-contract=off (which keeps results the same from build to build) forbids the compiler to fuse on its
// own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// A test sets the width by itself and gets no intrinsics: so AVX-512's loops run where there is no AVX-512.
#if !defined(MEDACCEL_REGISTER_BYTES)
#if defined(__AVX512F__)
#define MEDACCEL_AVX512
#define MEDACCEL_REGISTER_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define MEDACCEL_AVX2
#define MEDACCEL_REGISTER_BYTES 32
#else
#if defined(__SSE2__)
#define MEDACCEL_SSE2
#endif
#define MEDACCEL_REGISTER_BYTES 16
#endif
#endif

namespace medaccel::simd {

constexpr int kBytes = MEDACCEL_REGISTER_BYTES;

template <class T>
struct Vec {
    static constexpr int width = kBytes / sizeof(T);
    typedef T Native __attribute__((vector_size(kBytes)));
    // Rows of a volume start anywhere. (Not memcpy: GCC then keeps arrays of registers in memory.)
    typedef T Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
    Native v;

    static Vec zero() { return {Native{}}; }
    static Vec all(T x) { return {x - Native{}}; }
    static Vec load(const T* p) { return {*reinterpret_cast<const Unaligned*>(p)}; }
    void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }
    // Stores past the caches, for outputs that are too large to be found there again; p is aligned to kBytes. Call
    // `finish_streams` before another thread may read them.
    void stream(T* p) const {
#if defined(MEDACCEL_AVX512)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(MEDACCEL_AVX2)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(MEDACCEL_SSE2)
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
        store(p);
#endif
    }
    Vec operator+(Vec o) const { return {v + o.v}; }
    Vec operator-(Vec o) const { return {v - o.v}; }
    Vec operator*(Vec o) const { return {v * o.v}; }
    T operator[](int i) const { return v[i]; }
};

inline void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <class T>
bool is_aligned(const T* p) {
    return reinterpret_cast<std::uintptr_t>(p) % kBytes == 0;
}

// a · b + c, rounded once where the instruction set can, twice in the baseline.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(MEDACCEL_AVX512)
    return {(Vec<float>::Native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
#elif defined(MEDACCEL_AVX2)
    return {(Vec<float>::Native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
#else
    return a * b + c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(MEDACCEL_AVX512)
    return {(Vec<double>::Native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
#elif defined(MEDACCEL_AVX2)
    return {(Vec<double>::Native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
#else
    return a * b + c;
#endif
}

// a > b ? a : b: where either is NaN, b. (GCC 12 warns of its own header where AVX-512's max has no mask.)
inline Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(MEDACCEL_AVX512)
    return {(Vec<float>::Native)_mm512_maskz_max_ps(0xFFFF, (__m512)a.v, (__m512)b.v)};
#elif defined(MEDACCEL_AVX2)
    return {(Vec<float>::Native)_mm256_max_ps((__m256)a.v, (__m256)b.v)};
#else
    return {a.v > b.v ? a.v : b.v};
#endif
}

inline Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(MEDACCEL_AVX512)
    return {(Vec<double>::Native)_mm512_maskz_max_pd(0xFF, (__m512d)a.v, (__m512d)b.v)};
#elif defined(MEDACCEL_AVX2)
    return {(Vec<double>::Native)_mm256_max_pd((__m256d)a.v, (__m256d)b.v)};
#else
    return {a.v > b.v ? a.v : b.v};
#endif
}

// Rounded as IEEE 754 says, like every processor's.
inline Vec<float> sqrt(Vec<float> a) {
#if defined(MEDACCEL_AVX512)
    return {(Vec<float>::Native)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)a.v)};
#elif defined(MEDACCEL_AVX2)
    return {(Vec<float>::Native)_mm256_sqrt_ps((__m256)a.v)};
#elif defined(MEDACCEL_SSE2)
    return {(Vec<float>::Native)_mm_sqrt_ps((__m128)a.v)};
#else
    for (int i = 0; i < Vec<float>::width; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
#endif
}

inline Vec<double> sqrt(Vec<double> a) {
#if defined(MEDACCEL_AVX512)
    return {(Vec<double>::Native)_mm512_maskz_sqrt_pd(0xFF, (__m512d)a.v)};
#elif defined(MEDACCEL_AVX2)
    return {(Vec<double>::Native)_mm256_sqrt_pd((__m256d)a.v)};
#elif defined(MEDACCEL_SSE2)
    return {(Vec<double>::Native)_mm_sqrt_pd((__m128d)a.v)};
#else
    for (int i = 0; i < Vec<double>::width; ++i) a.v[i] = __builtin_sqrt(a.v[i]);
    return a;
#endif
}

// The G elements at p, over and over: p[0] … p[G-1] p[0] … G · sizeof(T) is at most 16 bytes.
template <int G, class T>
Vec<T> repeat(const T* p) {
    static_assert(G == 1 || G * sizeof(T) == 8 || G * sizeof(T) == 16);
    if constexpr (G == 1) {
        return Vec<T>::all(*p);
    } else if constexpr (G * sizeof(T) == 8) {
        double two;
        std::memcpy(&two, p, 8);
        return {(typename Vec<T>::Native)Vec<double>::all(two).v};
    } else {
        // Not the loop below: GCC puts it together in memory and loads it as a whole, which waits for all the stores.
#if defined(MEDACCEL_AVX512)
        return {(typename Vec<T>::Native)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)))};
#elif defined(MEDACCEL_AVX2)
        return {(typename Vec<T>::Native)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
#else
        Vec<T> r;
        for (int i = 0; i < kBytes; i += 16) std::memcpy(reinterpret_cast<char*>(&r.v) + i, p, 16);
        return r;
#endif
    }
}

// The same rounding for the elements that do not fill a register.
template <class T>
inline T fma(T a, T b, T c) {
#if defined(MEDACCEL_AVX512) || defined(MEDACCEL_AVX2)
    if constexpr (sizeof(T) == 4)
        return __builtin_fmaf(a, b, c);
    else
        return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace medaccel::simd
