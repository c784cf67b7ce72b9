// SPDX-License-Identifier: Apache-2.0
// One update of a diffusion sampler, elementwise:
//   x0 = clip(a · x + b · m),  x′ = c · x0 + d · x + e · m + f · p + s · z
// and, where the mask is 0, x′ = guide_scale · guide + guide_std · z′ instead.
//
// z is given, or made here: element i of sample n has the i mod 4-th normal (normal.h) of Philox' words for the key
// `seed` and the counter (⌊i / 4⌋, sample_offset + n, offset's low half, offset's high half); z′ is the same with
// offset's top bit set. So it depends on neither threads, batch split nor device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/shapes.h"

namespace medaccel::diffusion_step {

enum class Storage : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// The order of `Step::coefficients`' rows.
enum Coefficient : int { kA, kB, kC, kD, kE, kF, kS, kGuideScale, kGuideStd, kCoefficients };

constexpr uint64_t kGuideBit = uint64_t{1} << 63;

struct Input {
    const void* data;  // dense samples; null: no input
    Storage storage;
    int64_t stride;  // elements between samples; 0: all share one
};

struct Output {
    void* data;  // [batch, size]; null: not wanted
    Storage storage;
};

// Key and offset of the random numbers.
struct Noise {
    uint64_t seed, offset;
    uint32_t sample_offset;
};

// The arguments that forward and backward share. Arithmetic is double where `sample` (or the gradients) is, else
// float.
struct Problem {
    int64_t batch, size;         // samples, elements of one
    const double* coefficients;  // [kCoefficients][columns]
    int64_t columns;             // batch, or 1: all samples share them
    bool clip;
    double low, high;
    int threads;  // ignored on the GPU

    double coefficient(Coefficient i, int64_t sample) const {
        return coefficients[i * columns + (columns == 1 ? 0 : sample)];
    }
};

struct Forward {
    Input sample, model_output, previous, noise, guide;
    Input mask;       // bytes, 0: keep the guide; its storage has no meaning
    Output next, x0;  // may be inputs' memory, where storage and strides agree
};

// The gradients of x′ and x0 with respect to sample and model_output. Those two are needed where there is a clip.
struct Backward {
    Input grad_next, grad_x0, sample, model_output, mask;
    Output grad_sample, grad_model_output;
};

constexpr int64_t kMaxSize = int64_t{1} << 34;  // ⌊i / 4⌋ fits 32 bits

inline void check_size(const Problem& p) {
    if (p.size <= kMaxSize) return;
    throw std::invalid_argument("diffusion_step: a sample has " + std::to_string(p.size) +
                                " elements; expected at most " + std::to_string(kMaxSize));
}

void forward(const Problem& problem, const Forward& tensors, const Noise& noise);
void backward(const Problem& problem, const Backward& tensors);

}  // namespace medaccel::diffusion_step
