// SPDX-License-Identifier: Apache-2.0
// The taps of a one-dimensional Gaussian and their derivatives by sigma, in double precision. Shared by the
// CPU and the CUDA kernel, so that both filter with the same numbers.
//
//   erf:        t_k = ½ [erf((k + ½)/(σ√2)) − erf((k − ½)/(σ√2))]   the Gaussian's integral over the voxel
//   sampled:    t_k = exp(−k²/2σ²) / (σ√(2π))
//   scalespace: t_k = e^{−σ²} I_k(σ²)                                Lindeberg's discrete Gaussian
//
// The radius is int(max(truncated · σ, ½) + ½), as in MONAI. σ = 0 is the identity, with derivative 0.
#pragma once

#include <cmath>

#include "../common/shapes.h"

namespace medaccel::gaussian {

enum class Approx : int { erf = 0, sampled = 1, scalespace = 2 };

constexpr double kSqrt2 = 1.4142135623730951;
constexpr double kSqrt2Pi = 2.5066282746310002;

MEDACCEL_HOST_DEVICE inline int radius_of(double sigma, double truncated) {
    if (!(sigma > 0)) return 0;
    const double reach = truncated * sigma;
    return static_cast<int>((reach > 0.5 ? reach : 0.5) + 0.5);
}

MEDACCEL_HOST_DEVICE inline double erf_tap(int k, double sigma) {
    const double scale = 1.0 / (sigma * kSqrt2);
    // Far out both erf are 1 to the last bit; erfc of the absolute value keeps the digits of their
    // difference.
    const double a = k < 0 ? -k : k;
    if (k == 0) return erf(0.5 * scale);
    return 0.5 * (erfc((a - 0.5) * scale) - erfc((a + 0.5) * scale));
}

MEDACCEL_HOST_DEVICE inline double erf_tap_derivative(int k, double sigma) {
    const double upper = (k + 0.5) / sigma, lower = (k - 0.5) / sigma;
    return (lower * exp(-0.5 * lower * lower) - upper * exp(-0.5 * upper * upper)) / (sigma * kSqrt2Pi);
}

MEDACCEL_HOST_DEVICE inline double sampled_tap(int k, double sigma) {
    const double z = k / sigma;
    return exp(-0.5 * z * z) / (sigma * kSqrt2Pi);
}

MEDACCEL_HOST_DEVICE inline double sampled_tap_derivative(int k, double sigma) {
    const double z = k / sigma;
    return sampled_tap(k, sigma) * (z * z - 1.0) / sigma;
}

// Fills half[0 … radius + 1] with e^{−t} I_k(t), t = σ², by Miller's downward recurrence
// I_{k−1} = I_{k+1} + (2k/t) I_k, normalised by e^{−t} (I_0 + 2 Σ I_k) = 1. It starts so far out that the
// start's error has died away: a Gaussian of width σ is below 1e-16 at 9σ, a Poisson-like tail needs a few
// tens more.
MEDACCEL_HOST_DEVICE inline void scalespace_half(double sigma, int radius, double* half) {
    const double t = sigma * sigma;
    const int wanted = radius + 1;
    if (t < 1e-30) {  // I_k(t) → (t/2)^k / k!; the recurrence would overflow
        for (int k = 0; k <= wanted; ++k) half[k] = k == 0 ? 1.0 : k == 1 ? 0.5 * t : 0.0;
        return;
    }
    const int spread = static_cast<int>(10.0 * sigma) + 40;
    const int start = (wanted > spread ? wanted : spread) + 20;
    double above = 0.0, here = 1e-280, sum = 0.0;
    for (int k = 0; k <= wanted; ++k) half[k] = 0.0;
    for (int k = start; k > 0; --k) {
        const double below = above + 2.0 * k / t * here;
        if (k <= wanted) half[k] = here;
        sum += 2.0 * here;
        above = here;
        here = below;
        if (here > 1e250) {  // rescale before it overflows
            const double shrink = 1e-250;
            here *= shrink;
            above *= shrink;
            sum *= shrink;
            for (int j = k; j <= wanted; ++j) half[j] *= shrink;
        }
    }
    half[0] = here;
    sum += here;
    for (int k = 0; k <= wanted; ++k) half[k] /= sum;
}

// work: half[] of scalespace_half, read for that approximation only.
MEDACCEL_HOST_DEVICE inline double tap_at(Approx approx, int k, double sigma, const double* work) {
    if (approx == Approx::erf) return erf_tap(k, sigma);
    if (approx == Approx::sampled) return sampled_tap(k, sigma);
    return work[k < 0 ? -k : k];
}

MEDACCEL_HOST_DEVICE inline double derivative_at(Approx approx, int k, double sigma, const double* work) {
    if (approx == Approx::erf) return erf_tap_derivative(k, sigma);
    if (approx == Approx::sampled) return sampled_tap_derivative(k, sigma);
    // d/dt e^{−t} I_k = e^{−t} [½ (I_{k−1} + I_{k+1}) − I_k], and dt/dσ = 2σ
    const int a = k < 0 ? -k : k;
    return 2.0 * sigma * (0.5 * (work[a == 0 ? 1 : a - 1] + work[a + 1]) - work[a]);
}

// taps[0 … 2·radius] and, unless null, derivative[0 … 2·radius]; work holds radius + 2 doubles (scalespace only).
MEDACCEL_HOST_DEVICE inline void fill_taps(double sigma, int radius, Approx approx, bool normalize, double* taps,
                                           double* derivative, double* work) {
    const int n = 2 * radius + 1;
    if (radius == 0) {
        taps[0] = 1.0;
        if (derivative) derivative[0] = 0.0;
        return;
    }
    if (approx == Approx::scalespace) scalespace_half(sigma, radius, work);
    double sum = 0.0, slope = 0.0;
    for (int i = 0; i < n; ++i) {
        sum += taps[i] = tap_at(approx, i - radius, sigma, work);
        if (derivative) slope += derivative[i] = derivative_at(approx, i - radius, sigma, work);
    }
    if (!normalize) return;
    // d(t/Σt) = (dt − (t/Σt) Σdt) / Σt. A σ so small that the sampled taps vanish but for the centre leaves Σt > 0.
    for (int i = 0; i < n; ++i) {
        taps[i] /= sum;
        if (derivative) derivative[i] = (derivative[i] - taps[i] * slope) / sum;
    }
}

}  // namespace medaccel::gaussian
