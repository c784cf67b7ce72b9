// SPDX-License-Identifier: Apache-2.0
// Runs the diffusion step's CPU kernel without Python or torch in the process: for the sanitizers, and with registers
// of any width. Compared with plain loops.
#include <cstdio>
#include <limits>
#include <memory>

#include "diffusion_step_cases.h"

using namespace diffusion_step_cases;

namespace {

template <class T>
constexpr Storage kStorage = sizeof(T) == 4 ? Storage::float32 : Storage::float64;

template <class T>
struct Buffer {  // exactly as long as the tensor, so that a sanitizer sees the first element too many
    int64_t n;
    std::unique_ptr<T[]> data;
    explicit Buffer(int64_t size) : n(size), data(new T[size]) {
        for (int64_t i = 0; i < n; ++i) data[i] = std::numeric_limits<T>::quiet_NaN();
    }
    Buffer(int64_t size, int tensor) : Buffer(size) {
        for (int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(value(tensor, i));
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
    const Problem problem{c.batch, c.size, kCoefficient, 1, c.clip, kLow, kHigh, threads};
    backward(problem, {input(grad_next, true), input(grad_x0, true), input(x, true), input(m, c.model_output), masked,
                       grad_sample.output(), grad_model.output()});
    const Buffer<T>&to_next = in_place ? x : next, &to_x0 = in_place ? m : x0;
    forward(problem,
            {input(x, true), input(m, c.model_output), input(p, c.previous), input(z, c.noise), input(guide, c.mask),
             masked, to_next.output(), c.x0 ? to_x0.output() : Output{}},
            kNoise);
    double error = 0;
    const auto compare = [&](T ours, double truth) {
        const double e = std::fabs(ours - truth);
        if (!(e <= error)) error = e;
    };
    for (int64_t i = 0; i < n; ++i) {
        const Expected e = expected(c, i / c.size, i % c.size);
        compare(to_next.data[i], e.next);
        if (c.x0) compare(to_x0.data[i], e.x0);
        compare(grad_sample.data[i], e.grad_sample);
        compare(grad_model.data[i], e.grad_model_output);
    }
    return error;
}

}  // namespace

int main() {
    int checked = 0, failed = 0;
    for (const Case& c : all_cases(40001)) {
        const int threads = 1 + static_cast<int>(c.size % 3);
        for (int in_place = 0; in_place < 2; ++in_place) {
            const double errors[2] = {check<float>(c, threads, in_place), check<double>(c, threads, in_place)};
            for (int kind = 0; kind < 2; ++kind, ++checked) {
                const double bound = kind == 0 ? 3e-6 : 5e-15;
                if (errors[kind] <= bound) continue;
                ++failed;
                std::printf("FAILED error %g, size %ld, in place %d, %s\n", errors[kind], static_cast<long>(c.size),
                            in_place, kind ? "double" : "float");
            }
        }
    }
    std::printf("%d checked, %d failed\n", checked, failed);
    return failed != 0;
}
