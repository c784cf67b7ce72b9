// SPDX-License-Identifier: Apache-2.0
// Random words to standard normals (Box–Muller), one number at a time or a register of them: the same lines for the
// GPU and for each instruction set of the CPU, so that they differ by rounding at most.
//
// A word w stands for the uniform number u = (w + ½) · 2⁻³². The pair (w0, w1) gives √(−2 ln u0) · cos 2πu1 and
// √(−2 ln u0) · sin 2πu1. Both functions are reduced in integers, where nothing is lost: near u = 1 the logarithm
// takes u − 1, and the angle is cut into quarter turns. So the result's error, against exact arithmetic on the same
// words, is at most 5 · 2⁻²⁴ (float) or 5 · 2⁻⁵³ (double) of √(−2 ln u0) (4.3 and 3.5 seen in 2^24 normals), and the
// largest normal is √(66 ln 2) = 6.76 in every dtype.
//
// Polynomials: fdlibm's (Sun Microsystems, 1993: e_log.c, k_sin.c, k_cos.c; e_logf.c) and, for the float's sine and
// cosine, Cephes' (Moshier, sinf.c).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/shapes.h"

namespace medaccel::diffusion_step {

template <class T>
struct Numbers;

template <>
struct Numbers<float> {
    using Word = uint32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr Word one = 127u << 23;  // the bits of 1
    static constexpr Word root_half = 0x3F3504F3u;
    static constexpr Word small = 0x4B000000u;  // the bits of 2^23: a whole number below that, written into them
    static constexpr float small_value = 8388608.0f;
    static constexpr int log_terms = 4, sine_terms = 3, cosine_terms = 3;
};

template <>
struct Numbers<double> {
    using Word = uint64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr Word one = uint64_t{1023} << 52;
    static constexpr Word root_half = 0x3FE6A09E667F3BCDu;
    static constexpr Word small = 0x4330000000000000u;  // 2^52
    static constexpr double small_value = 4503599627370496.0;
    static constexpr int log_terms = 7, sine_terms = 6, cosine_terms = 6;
};

// ln(1 + t) = t − t²/2 + s · (t²/2 + z · Σ log_term(i) zⁱ), s = t / (2 + t), z = s²: i-th term.
template <class T>
MEDACCEL_HOST_DEVICE constexpr T log_term(int i) {
    if (sizeof(T) == 4) {
        constexpr float terms[4] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
        return static_cast<T>(terms[i & 3]);
    }
    constexpr double terms[7] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                 2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                 1.479819860511658591e-01};
    return static_cast<T>(terms[i]);
}

// sin y = y + y³ Σ sine_term(i) y²ⁱ for |y| ≤ π/4.
template <class T>
MEDACCEL_HOST_DEVICE constexpr T sine_term(int i) {
    if (sizeof(T) == 4) {
        constexpr float terms[3] = {-1.6666654611e-1f, 8.3321608736e-3f, -1.9515295891e-4f};
        return static_cast<T>(terms[i % 3]);
    }
    constexpr double terms[6] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,
                                 -1.98412698298579493134e-04, 2.75573137070700676789e-06,
                                 -2.50507602534068634195e-08, 1.58969099521155010221e-10};
    return static_cast<T>(terms[i]);
}

// cos y = 1 − y²/2 + y⁴ Σ cosine_term(i) y²ⁱ.
template <class T>
MEDACCEL_HOST_DEVICE constexpr T cosine_term(int i) {
    if (sizeof(T) == 4) {
        constexpr float terms[3] = {4.166664568298827e-2f, -1.388731625493765e-3f, 2.443315711809948e-5f};
        return static_cast<T>(terms[i % 3]);
    }
    constexpr double terms[6] = {4.16666666666666019037e-02, -1.38888888888741095749e-03,
                                 2.48015872894767294178e-05, -2.75573143513906633035e-07,
                                 2.08757232129817482790e-09, -1.13596475577881948265e-11};
    return static_cast<T>(terms[i]);
}

// One number at a time. (VectorLane in noise.h is a register of them.)
template <class T>
struct ScalarLane {
    using Element = T;
    using Real = T;
    using Bits = typename Numbers<T>::Word;

    MEDACCEL_HOST_DEVICE static Real all(T x) { return x; }
    MEDACCEL_HOST_DEVICE static Bits bits(Real x) {
        Bits b;
        memcpy(&b, &x, sizeof b);
        return b;
    }
    MEDACCEL_HOST_DEVICE static Real real(Bits b) {
        Real x;
        memcpy(&x, &b, sizeof x);
        return x;
    }
    // The word's low 32 bits as a signed number.
    MEDACCEL_HOST_DEVICE static Real from_signed(Bits w) {
        return static_cast<T>(static_cast<int32_t>(static_cast<uint32_t>(w)));
    }
    MEDACCEL_HOST_DEVICE static float fma(float a, float b, float c) { return fmaf(a, b, c); }
    MEDACCEL_HOST_DEVICE static double fma(double a, double b, double c) { return ::fma(a, b, c); }
    MEDACCEL_HOST_DEVICE static float sqrt(float x) { return sqrtf(x); }
    MEDACCEL_HOST_DEVICE static double sqrt(double x) { return ::sqrt(x); }
};

// Words (the upper half of a 64-bit lane is ignored) to a pair of normals.
template <class L>
MEDACCEL_HOST_DEVICE inline void normal_pair(typename L::Bits w0, typename L::Bits w1, typename L::Real& cosine,
                                             typename L::Real& sine) {
    using T = typename L::Element;
    using N = Numbers<T>;
    using Word = typename N::Word;
    using Real = typename L::Real;
    using Bits = typename L::Bits;
    constexpr T turn = T(1) / T(4294967296.0);
    constexpr Word mantissa = (Word{1} << N::mantissa_bits) - 1;

    // u0 = m · 2^k, √½ ≤ m < √2; t = m − 1. As a signed number the word is u0 · 2^32 or (u0 − 1) · 2^32.
    const Real near = (L::from_signed(w0) + T(0.5)) * turn;
    const Real u = near < T(0) ? near + T(1) : near;
    const Bits scaled = L::bits(u) - N::root_half + N::one;
    const Bits exponent = scaled >> N::mantissa_bits;  // k + that of 1
    const Real k = L::real(exponent | N::small) - (N::small_value + T(N::one >> N::mantissa_bits));
    const Real m = L::real((scaled & mantissa) + N::root_half);
    const Real t = exponent == (N::one >> N::mantissa_bits) ? near : m - T(1);
    const Real s = t / (t + T(2)), z = s * s;
    Real sum = L::all(log_term<T>(N::log_terms - 1));
    for (int i = N::log_terms - 2; i >= 0; --i) sum = L::fma(sum, z, L::all(log_term<T>(i)));
    const Real square = t * t;
    const Real rest = L::fma(-s, L::fma(z + z, sum, square), square);
    const Real log = L::fma(k, L::all(T(-1.3862943611198906188)), L::fma(t, L::all(T(-2)), rest));  // −2 ln u0
    const Real radius = L::sqrt(log);

    // 2π u1 = quarter · π/2 + y, |y| ≤ π/4.
    const Bits shifted = w1 + Word{0x20000000u};
    const Bits quarter = (shifted >> 30) & Word{3};
    const Real y = (L::from_signed((shifted & Word{0x3FFFFFFFu}) - Word{0x20000000u}) + T(0.5)) *
                   T(1.4629180792671596810e-09);  // 2π · 2^−32
    const Real y2 = y * y;
    Real sines = L::all(sine_term<T>(N::sine_terms - 1)), cosines = L::all(cosine_term<T>(N::cosine_terms - 1));
    for (int i = N::sine_terms - 2; i >= 0; --i) sines = L::fma(sines, y2, L::all(sine_term<T>(i)));
    for (int i = N::cosine_terms - 2; i >= 0; --i) cosines = L::fma(cosines, y2, L::all(cosine_term<T>(i)));
    const Real sin_y = L::fma(y2 * y, sines, y);
    const Real cos_y = L::fma(y2 * y2, cosines, L::fma(y2, L::all(T(-0.5)), L::all(T(1))));
    const auto odd = (quarter & Word{1}) != Word{0};
    constexpr int to_sign = 8 * sizeof(T) - 2;
    const Bits cosine_sign = ((quarter + Word{1}) & Word{2}) << to_sign, sine_sign = (quarter & Word{2}) << to_sign;
    cosine = radius * L::real(L::bits(odd ? sin_y : cos_y) ^ cosine_sign);
    sine = radius * L::real(L::bits(odd ? cos_y : sin_y) ^ sine_sign);
}

}  // namespace medaccel::diffusion_step
