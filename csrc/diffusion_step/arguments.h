// SPDX-License-Identifier: Apache-2.0
// Turns a call's numbers, as Python passes them, into the structs that both modules' kernels take.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "diffusion_step.h"

namespace medaccel::diffusion_step {

using InputNumbers = std::tuple<std::uintptr_t, int, int64_t>;  // address or 0, storage, stride between samples
using OutputNumbers = std::pair<std::uintptr_t, int>;
using Clip = std::optional<std::pair<double, double>>;

inline Input input_of(const InputNumbers& n) {
    return {reinterpret_cast<const void*>(std::get<0>(n)), static_cast<Storage>(std::get<1>(n)), std::get<2>(n)};
}

inline Output output_of(const OutputNumbers& n) {
    return {reinterpret_cast<void*>(n.first), static_cast<Storage>(n.second)};
}

// in: sample, model_output, previous, noise, guide, mask; out: x′, x0.
inline Forward forward_of(const std::vector<InputNumbers>& in, const std::vector<OutputNumbers>& out) {
    return {input_of(in.at(0)), input_of(in.at(1)), input_of(in.at(2)),   input_of(in.at(3)),
            input_of(in.at(4)), input_of(in.at(5)), output_of(out.at(0)), output_of(out.at(1))};
}

// in: gradients of x′ and x0, sample, model_output, mask; out: gradients of sample and model_output.
inline Backward backward_of(const std::vector<InputNumbers>& in, const std::vector<OutputNumbers>& out) {
    return {input_of(in.at(0)), input_of(in.at(1)),   input_of(in.at(2)),  input_of(in.at(3)),
            input_of(in.at(4)), output_of(out.at(0)), output_of(out.at(1))};
}

inline Problem problem_of(int64_t batch, int64_t size, const double* coefficients, int64_t columns, const Clip& clip,
                          int threads) {
    return {
        batch,  size, coefficients, columns, clip.has_value(), clip ? clip->first : 0.0, clip ? clip->second : 0.0,
        threads};
}

// seed, offset, sample_offset.
inline Noise noise_of(const std::tuple<uint64_t, uint64_t, uint32_t>& n) {
    return {std::get<0>(n), std::get<1>(n), std::get<2>(n)};
}

}  // namespace medaccel::diffusion_step
