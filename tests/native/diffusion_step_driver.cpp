// SPDX-License-Identifier: Apache-2.0
// Runs the diffusion step's CPU kernel on every type of storage without Python or torch in the process: for the
// sanitizers, and with registers of any width. Compared with plain loops.
#include <cstdio>
#include <limits>
#include <memory>
#include <type_traits>

#include "../../csrc/diffusion_step/half.h"
#include "cpu_driver.h"
#include "diffusion_step_cases.h"

using namespace diffusion_step_cases;

namespace {

template <class T>
constexpr Storage kStorage = std::is_same_v<T, float>      ? Storage::float32
                             : std::is_same_v<T, double>   ? Storage::float64
                             : std::is_same_v<T, BFloat16> ? Storage::bfloat16
                                                           : Storage::float16;

template <class T>
struct Buffer {  // exactly as long as the tensor, so that a sanitizer sees the first element too many
    int64_t n;
    std::unique_ptr<T[]> data;
    explicit Buffer(int64_t size) : n(size), data(new T[size]) {
        for (int64_t i = 0; i < n; ++i) data[i] = T(std::numeric_limits<float>::quiet_NaN());
    }
    Buffer(int64_t size, int tensor) : Buffer(size) {
        for (int64_t i = 0; i < n; ++i) data[i] = T(static_cast<float>(value(tensor, i)));
    }
    Output output() const { return {data.get(), kStorage<T>}; }
};

template <class T>
double check(const Case& c, int threads, bool in_place) {
    const int64_t n = c.batch * c.size;
    const auto input = [&](const Buffer<T>& b, bool given) {
        return given ? Input{b.data.get(), kStorage<T>, c.size} : Input{};
    };
    Buffer<T> x(n, 0), m(n, 1), p(n, 2), z(n, 3), guide(n, 4), grad_next(n, 5), grad_x0(n, 6);
    Buffer<T> next(n), x0(n), grad_sample(n), grad_model(n);
    std::unique_ptr<uint8_t[]> mask(new uint8_t[n]);
    for (int64_t i = 0; i < n; ++i) mask[i] = generated(i);
    const Input masked = c.mask ? Input{mask.get(), Storage::float32, c.size} : Input{};
    std::vector<double> coefficients;
    const int64_t columns = c.per_sample ? c.batch : 1;
    for (int i = 0; i < kCoefficients; ++i)
        for (int64_t sample = 0; sample < columns; ++sample) coefficients.push_back(coefficient(c, i, sample));
    const Problem problem{c.batch, c.size, coefficients.data(), columns, c.clip, kLow, kHigh, threads};
    const Input model{m.data.get(), kStorage<T>, c.shared ? 0 : c.size};
    const bool to_sample = c.size % 3 != 1, to_model = c.size % 3 != 2;  // which gradients are wanted
    backward(problem,
             {input(grad_next, true), input(grad_x0, true), input(x, true), c.model_output ? model : Input{}, masked,
              to_sample ? grad_sample.output() : Output{}, to_model ? grad_model.output() : Output{}});
    const Buffer<T>&to_next = in_place ? x : next, &to_x0 = in_place && !c.shared ? m : x0;
    forward(problem,
            {input(x, true), c.model_output ? model : Input{}, input(p, c.previous), input(z, c.noise),
             input(guide, c.mask), masked, to_next.output(), c.x0 ? to_x0.output() : Output{}},
            kNoise);
    double error = 0;
    const auto compare = [&](T ours, double truth) {
        const double e = std::fabs(static_cast<double>(ours) - truth);
        if (!(e <= error)) error = e;
    };
    for (int64_t i = 0; i < n; ++i) {
        const Expected e = expected(c, i / c.size, i % c.size);
        compare(to_next.data[i], e.next);
        if (c.x0) compare(to_x0.data[i], e.x0);
        if (to_sample) compare(grad_sample.data[i], e.grad_sample);
        if (to_model) compare(grad_model.data[i], e.grad_model_output);
    }
    return error;
}

}  // namespace

int main(int argc, char** argv) {
    const bool races = driver::only_races(argc, argv);
    int checked = 0, failed = 0;
    const auto run = [&](const Case& c, int threads, bool halves) {
        if (races && threads == 1) return;
        for (int in_place = 0; in_place < 2; ++in_place) {
            // Values stay below 16, where half a step of bfloat16 is 2^-5 and of float16 2^-8.
            const std::pair<double, double> errors[] = {
                {check<float>(c, threads, in_place), 3e-6},
                {check<double>(c, threads, in_place), 5e-15},
                {halves ? check<BFloat16>(c, threads, in_place) : 0, 0.0313},
                {halves ? check<Float16>(c, threads, in_place) : 0, 0.00392},
            };
            for (int kind = 0; kind < (halves ? 4 : 2); ++kind, ++checked) {
                if (errors[kind].first <= errors[kind].second) continue;
                ++failed;
                std::printf("FAILED error %g, size %ld, in place %d, kind %d\n", errors[kind].first,
                            static_cast<long>(c.size), in_place, kind);
            }
        }
    };
    for (const Case& c : all_cases(40001)) run(c, 1 + static_cast<int>(c.size % 3), c.size == 515);
    // What is left of a register: every number of elements; and several jobs a sample.
    std::vector<int64_t> sizes;
    for (int64_t size = 1; size <= 70; ++size) sizes.push_back(size);
    for (int64_t size : {1025, 32768, 40003, 70000}) sizes.push_back(size);
    for (const int64_t size : sizes)
        for (int64_t flags : {size * 37 % 64, (size * 37 + 21) % 64})
            run({2, size, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0, (flags & 16) != 0,
                 (flags & 32) != 0, size % 2 == 0, size % 4 < 2},
                size < 100 ? 1 : 3, true);
    std::printf("%d checked, %d failed\n", checked, failed);
    return failed != 0;
}
