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

namespace medaccel::simd {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
struct Vec {
    static constexpr int width = kBytes / sizeof(T);
    typedef T Native __attribute__((vector_size(kBytes)));
    Native v;

    static Vec zero() { return {Native{}}; }
    static Vec all(T x) { return {x - Native{}}; }
    static Vec load(const T* p) {
        Vec r;
        std::memcpy(&r.v, p, kBytes);  // unaligned: rows of a volume start anywhere
        return r;
    }
    void store(T* p) const { std::memcpy(p, &v, kBytes); }
    // Past the caches, for outputs that are too large to be found there again; p is aligned to kBytes. Call
    // `finish_streams` before another thread may read them.
    void stream(T* p) const {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
        store(p);
#endif
    }
    Vec operator+(Vec o) const { return {v + o.v}; }
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
#if defined(__AVX512F__)
    return {(Vec<float>::Native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
#elif defined(__AVX2__) && defined(__FMA__)
    return {(Vec<float>::Native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
#else
    return a * b + c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
    return {(Vec<double>::Native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
#elif defined(__AVX2__) && defined(__FMA__)
    return {(Vec<double>::Native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
#else
    return a * b + c;
#endif
}

// The same rounding for the elements that do not fill a register.
template <class T>
inline T fma(T a, T b, T c) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    if constexpr (sizeof(T) == 4)
        return __builtin_fmaf(a, b, c);
    else
        return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace medaccel::simd
