// SPDX-License-Identifier: Apache-2.0
// 2^x in registers, for x ≤ 127 (float) or x ≤ 1023 (double).
//
// x = n + f with n whole and |f| ≤ ½: 2^f is a minimax polynomial that is exact at 0 (relative error 1.5e-8 in
// float, 4.8e-17 in double, before rounding), 2^n is written into the exponent's bits. Below the smallest normal
// number the result stays at that number (1.2e-38 or 2.2e-308): a softmax adds it to a sum of at least 1. NaN
// gives NaN.
#pragma once

#include "simd.h"

namespace medaccel::simd {

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
    using Int = uint32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr float smallest = -125.0f;
    static constexpr float round = 12582912.0f;  // 1.5 · 2^23: adding it leaves a whole number in the low bits
    static constexpr int degree = 6;
    static constexpr float coefficient[degree + 1] = {1.0f,
                                                      0.69314718562444279606f,
                                                      0.24022644037610632802f,
                                                      0.055503712037942915643f,
                                                      0.0096193393308075860718f,
                                                      0.0013383388720572234164f,
                                                      0.00014992648976402641944f};
};

template <>
struct Exp2<double> {
    using Int = uint64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr double smallest = -1021.0;
    static constexpr double round = 6755399441055744.0;  // 1.5 · 2^52
    static constexpr int degree = 11;
    static constexpr double coefficient[degree + 1] = {1.0,
                                                       0.69314718055994532857,
                                                       0.24022650695910083358,
                                                       0.055504108664818569925,
                                                       0.0096181291076163322253,
                                                       0.0013333558147404228724,
                                                       0.00015403530426115603769,
                                                       0.000015252732659188457517,
                                                       1.3215451946667500413e-6,
                                                       1.017863298982151054e-7,
                                                       7.0707465953709195224e-9,
                                                       4.3577109626682126322e-10};
};

// x[i] = 2^x[i]. Several registers go step by step together: one alone would wait for each step's latency.
template <class T, int N>
inline void exp2(Vec<T> (&x)[N]) {
    using E = Exp2<T>;
    typedef typename E::Int Bits __attribute__((vector_size(kBytes)));
    const Vec<T> smallest = Vec<T>::all(E::smallest), round = Vec<T>::all(E::round);
    constexpr int bias_bits = sizeof(T) == 4 ? 7 : 10;
    constexpr auto one =
        (typename E::Int{1} << (E::mantissa_bits + bias_bits)) - (typename E::Int{1} << E::mantissa_bits);
    Vec<T> shifted[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = max(smallest, x[i]);  // this order keeps a NaN
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) shifted[i] = x[i] + round;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = x[i] - (shifted[i] - round);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
        p[i] = fma(Vec<T>::all(E::coefficient[E::degree]), x[i], Vec<T>::all(E::coefficient[E::degree - 1]));
#pragma GCC unroll 12
    for (int k = E::degree - 2; k >= 0; --k)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) p[i] = fma(p[i], x[i], Vec<T>::all(E::coefficient[k]));
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const Bits power = ((Bits)shifted[i].v << E::mantissa_bits) + one;  // 2^n
        x[i] = p[i] * Vec<T>{(typename Vec<T>::Native)power};
    }
}

template <class T>
inline Vec<T> exp2(Vec<T> x) {
    Vec<T> one[1] = {x};
    exp2(one);
    return one[0];
}

}  // namespace medaccel::simd
