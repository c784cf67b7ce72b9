// SPDX-License-Identifier: Apache-2.0
// The diffusion step by plain loops in double, and the calls that both drivers make: CPU kernel and GPU kernel.
#pragma once

#include <cmath>
#include <vector>

#include "../../csrc/common/philox.h"
#include "../../csrc/diffusion_step/diffusion_step.h"

namespace diffusion_step_cases {

using namespace medaccel::diffusion_step;

constexpr Noise kNoise{0x0123456789ABCDEFull, (uint64_t{3} << 32) + 7, 5};
constexpr double kCoefficient[kCoefficients] = {1.25, -0.75, 0.3, 0.65, 0.1, 0.2, 0.4, 0.8, 0.6};
constexpr double kLow = -0.9, kHigh = 1.1;

struct Case {
    int64_t batch, size;
    bool model_output, previous, noise, mask, clip, x0;
    bool shared = false;      // all samples have the first one's model output
    bool per_sample = false;  // each sample has coefficients of its own
};

inline std::vector<Case> all_cases(int64_t largest) {
    std::vector<Case> cases;
    for (int64_t size : {int64_t{1}, int64_t{3}, int64_t{4}, int64_t{37}, int64_t{512}, int64_t{515}, largest})
        for (int flags = 0; flags < 64; flags += size == largest ? 21 : 1)
            cases.push_back({size < 64 ? 3 : 1, size, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0,
                             (flags & 8) != 0, (flags & 16) != 0, (flags & 32) != 0});
    return cases;
}

// A value for element i of the tensor with this number; the same everywhere, and exact in bfloat16 and float16.
inline double value(int tensor, int64_t i) {
    const uint64_t mixed = (static_cast<uint64_t>(i) + 7919u * tensor + 1) * 0x9E3779B97F4A7C15ull;
    return static_cast<double>(mixed >> 58) / 16.0 - 2.0;
}

inline double coefficient(const Case& c, int i, int64_t sample) {
    return kCoefficient[i] + (c.per_sample ? 0.0625 * static_cast<double>(sample) : 0.0);
}

inline bool generated(int64_t i) { return i % 5 != 2; }

inline double normal(int64_t sample, int64_t i, uint64_t offset) {
    const auto words = medaccel::philox::random_words(
        kNoise.seed, static_cast<uint32_t>(i / 4), kNoise.sample_offset + static_cast<uint32_t>(sample),
        static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32));
    const int pair = i % 4 / 2 * 2;
    const double u0 = (words.w[pair] + 0.5) / 4294967296.0, u1 = (words.w[pair + 1] + 0.5) / 4294967296.0;
    const double angle = 6.283185307179586477 * u1, radius = std::sqrt(-2 * std::log(u0));
    return radius * (i % 2 ? std::sin(angle) : std::cos(angle));
}

struct Expected {
    double next, x0, grad_sample, grad_model_output;
};

// Element i of a sample; tensors are numbered sample, model_output, previous, noise, guide, grad_next, grad_x0.
inline Expected expected(const Case& c, int64_t sample, int64_t i) {
    double k[kCoefficients];
    for (int j = 0; j < kCoefficients; ++j) k[j] = coefficient(c, j, sample);
    const int64_t at = sample * c.size + i;
    const double x = value(0, at), m = c.model_output ? value(1, c.shared ? i : at) : 0.0;
    const double u = k[kA] * x + k[kB] * m;
    const bool inside = !c.clip || (u >= kLow && u <= kHigh);
    const double x0 = c.clip ? std::fmin(std::fmax(u, kLow), kHigh) : u;
    double next = k[kC] * x0 + k[kD] * x + k[kE] * m;
    if (c.previous) next += k[kF] * value(2, at);
    next += k[kS] * (c.noise ? value(3, at) : normal(sample, i, kNoise.offset));
    double grad = value(5, at);
    if (c.mask && !generated(at)) {
        next = k[kGuideScale] * value(4, at) + k[kGuideStd] * normal(sample, i, kNoise.offset | kGuideBit);
        grad = 0;
    }
    const double inner = inside ? k[kC] * grad + value(6, at) : 0.0;
    return {next, x0, k[kA] * inner + k[kD] * grad, k[kB] * inner + k[kE] * grad};
}

}  // namespace diffusion_step_cases
