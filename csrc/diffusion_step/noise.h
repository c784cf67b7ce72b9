// SPDX-License-Identifier: Apache-2.0
// Normals on the CPU, a register of counters at a time.
#pragma once

#include "../common/philox.h"
#include "../common/simd.h"
#include "normal.h"

namespace medaccel::diffusion_step {

using simd::kBytes;
using simd::Vec;

// Identifies the numbers of one sample. c2 and c3 are the offset's halves.
struct Stream {
    uint64_t seed;
    uint32_t sample, offset_low, offset_high;
};

template <class T>
struct VectorLane {
    using Element = T;
    using Word = typename Numbers<T>::Word;
    using Real = typename Vec<T>::Native;
    typedef Word Bits __attribute__((vector_size(kBytes)));
    typedef int32_t Signed __attribute__((vector_size(kBytes)));

    static Real all(T x) { return Vec<T>::all(x).v; }
    static Bits bits(Real x) { return (Bits)x; }
    static Real real(Bits b) { return (Real)b; }
    static Real from_signed(Bits w) {
        if constexpr (sizeof(T) == 4) {
            return __builtin_convertvector((Signed)w, Real);
        } else {  // w + 2^31 < 2^32 written into the bits of 2^52
            const Bits positive = ((w ^ Word{0x80000000u}) & Word{0xFFFFFFFFu}) | Numbers<T>::small;
            return real(positive) - (Numbers<T>::small_value + 2147483648.0);
        }
    }
    static Real fma(Real a, Real b, Real c) { return simd::fma(Vec<T>{a}, Vec<T>{b}, Vec<T>{c}).v; }
    static Real sqrt(Real x) { return simd::sqrt(Vec<T>{x}).v; }
};

// Philox' state: 32-bit words in the low halves of 64-bit lanes. The upper halves hold what the multiplications left
// there; nothing reads them.
typedef uint64_t Lanes __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 8;

inline Lanes all_lanes(uint64_t x) { return x - Lanes{}; }

inline Lanes multiply_low(Lanes a, uint32_t b) {
#if defined(MEDACCEL_AVX512)
    return (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(MEDACCEL_AVX2)
    return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(MEDACCEL_SSE2)
    return (Lanes)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & uint64_t{0xFFFFFFFFu}) * uint64_t{b};
#endif
}

// Ten rounds on N registers of counters: word i of register n is state[n][i].
template <int N>
inline void philox_rounds(uint64_t seed, Lanes (&state)[N][4]) {
    Lanes k0 = all_lanes(seed & 0xFFFFFFFFu), k1 = all_lanes(seed >> 32);
    for (int round = 0; round < philox::kRounds; ++round) {
        for (int n = 0; n < N; ++n) {
            auto& c = state[n];
            const Lanes p0 = multiply_low(c[0], philox::kMultiplier0), p1 = multiply_low(c[2], philox::kMultiplier1);
            c[0] = (p1 >> 32) ^ c[1] ^ k0;
            c[2] = (p0 >> 32) ^ c[3] ^ k1;
            c[1] = p1;
            c[3] = p0;
        }
        k0 += all_lanes(philox::kWeyl0);
        k1 += all_lanes(philox::kWeyl1);
    }
}

// z[4 · p′ + i] = normals[i][p], where p′ is the counter that lane p stands for: see lane_counter.
template <class T>
inline void store_interleaved(const typename Vec<T>::Native (&normals)[4], T* z);

// The lanes of a register of floats stand for counters in such an order that shuffles within 16 bytes put the
// normals into theirs.
template <class T>
constexpr int lane_counter(int p) {
    return sizeof(T) == 4 ? p % 4 * (kBytes / 16) + p / 4 : p;
}

template <>
inline void store_interleaved<float>(const Vec<float>::Native (&normals)[4], float* z) {
#if defined(MEDACCEL_AVX2)
    const __m256 a = (__m256)normals[0], b = (__m256)normals[1], c = (__m256)normals[2], d = (__m256)normals[3];
    const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
    const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
    _mm256_storeu_ps(z, _mm256_shuffle_ps(ab0, cd0, 0x44));
    _mm256_storeu_ps(z + 8, _mm256_shuffle_ps(ab0, cd0, 0xEE));
    _mm256_storeu_ps(z + 16, _mm256_shuffle_ps(ab1, cd1, 0x44));
    _mm256_storeu_ps(z + 24, _mm256_shuffle_ps(ab1, cd1, 0xEE));
#elif defined(MEDACCEL_AVX512)
    constexpr __mmask16 every = 0xFFFF;
    const __m512 a = (__m512)normals[0], b = (__m512)normals[1], c = (__m512)normals[2], d = (__m512)normals[3];
    const __m512 ab0 = _mm512_maskz_unpacklo_ps(every, a, b), ab1 = _mm512_maskz_unpackhi_ps(every, a, b);
    const __m512 cd0 = _mm512_maskz_unpacklo_ps(every, c, d), cd1 = _mm512_maskz_unpackhi_ps(every, c, d);
    _mm512_storeu_ps(z, _mm512_maskz_shuffle_ps(every, ab0, cd0, 0x44));
    _mm512_storeu_ps(z + 16, _mm512_maskz_shuffle_ps(every, ab0, cd0, 0xEE));
    _mm512_storeu_ps(z + 32, _mm512_maskz_shuffle_ps(every, ab1, cd1, 0x44));
    _mm512_storeu_ps(z + 48, _mm512_maskz_shuffle_ps(every, ab1, cd1, 0xEE));
#else
    for (int p = 0; p < Vec<float>::width; ++p)
        for (int i = 0; i < 4; ++i) z[4 * lane_counter<float>(p) + i] = normals[i][p];
#endif
}

template <>
inline void store_interleaved<double>(const Vec<double>::Native (&normals)[4], double* z) {
    for (int p = 0; p < Vec<double>::width; ++p)
        for (int i = 0; i < 4; ++i) z[4 * p + i] = normals[i][p];
}

// The number of normals that one call makes.
template <class T>
constexpr int kNormals = 4 * Vec<T>::width;

// z[kNormals<T>]: those of the elements from 4 · first on.
template <class T>
inline void normals_at(const Stream& stream, uint64_t first, T* z) {
    using L = VectorLane<T>;
    constexpr int N = 8 / sizeof(T);  // registers of 64-bit lanes for one register of T's counters
    Lanes state[N][4];
    for (int n = 0; n < N; ++n) {
        Lanes counters{};
        for (int lane = 0; lane < kLanes; ++lane) counters[lane] = first + lane_counter<T>(N * lane + n);
        state[n][0] = counters;
        state[n][1] = all_lanes(stream.sample);
        state[n][2] = all_lanes(stream.offset_low);
        state[n][3] = all_lanes(stream.offset_high);
    }
    philox_rounds<N>(stream.seed, state);
    typename L::Bits words[4];
    for (int i = 0; i < 4; ++i) {
        if constexpr (N == 2)
            words[i] = (typename L::Bits)((state[0][i] & uint64_t{0xFFFFFFFFu}) | (state[1][i] << 32));
        else
            words[i] = state[0][i] & uint64_t{0xFFFFFFFFu};
    }
    typename L::Real normals[4];
    normal_pair<L>(words[0], words[1], normals[0], normals[1]);
    normal_pair<L>(words[2], words[3], normals[2], normals[3]);
    store_interleaved<T>(normals, z);
}

}  // namespace medaccel::diffusion_step
