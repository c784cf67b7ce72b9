// SPDX-License-Identifier: Apache-2.0
// The diffusion step's GPU kernels on the emulator, against plain loops: for the sanitizers and the orders of
// threads. Prints a checksum of every result.
#include <cstdio>

#include "../native/diffusion_step_cases.h"
#include "diffusion_step/cuda.h"
#include "driver.h"

using namespace diffusion_step_cases;

namespace {

std::vector<float> values(int tensor, int64_t n) {
    std::vector<float> v(n);
    for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(value(tensor, i));
    return v;
}

double check(const Case& c, bool on_device) {
    const int64_t n = c.batch * c.size;
    const auto input = [&](const driver::DeviceArray<float>& a, bool given) {
        return given ? Input{a.data(), Storage::float32, c.size} : Input{};
    };
    const driver::DeviceArray<float> x(values(0, n)), m(values(1, n)), p(values(2, n)), z(values(3, n)),
        guide(values(4, n)), grad_next(values(5, n)), grad_x0(values(6, n));
    const driver::DeviceArray<float> next(n), x0(n), grad_sample(n), grad_model(n);
    std::vector<unsigned char> bytes(n);
    for (int64_t i = 0; i < n; ++i) bytes[i] = generated(i);
    const driver::DeviceArray<unsigned char> mask(bytes);
    const Input masked = c.mask ? Input{mask.data(), Storage::float32, c.size} : Input{};
    const driver::DeviceArray<double> rows(std::vector<double>(kCoefficient, kCoefficient + kCoefficients));
    const driver::DeviceArray<int64_t> key(
        {static_cast<int64_t>(kNoise.seed), static_cast<int64_t>(kNoise.offset), int64_t{kNoise.sample_offset}});
    GpuProblem problem{
        {c.batch, c.size, on_device ? rows.data() : nullptr, 1, c.clip, kLow, kHigh, 1}, {}, 0, nullptr};
    for (int i = 0; i < kCoefficients; ++i) problem.shared[i] = kCoefficient[i];
    const auto output = [](const driver::DeviceArray<float>& a) { return Output{a.data(), Storage::float32}; };
    forward_gpu(problem,
                {input(x, true), input(m, c.model_output), input(p, c.previous), input(z, c.noise),
                 input(guide, c.mask), masked, output(next), c.x0 ? output(x0) : Output{}},
                on_device ? Noise{} : kNoise, on_device ? key.data() : nullptr);
    backward_gpu(problem, {input(grad_next, true), input(grad_x0, true), input(x, true), input(m, c.model_output),
                           masked, output(grad_sample), output(grad_model)});
    std::vector<double> truth[4];
    for (int64_t i = 0; i < n; ++i) {
        const Expected e = expected(c, i / c.size, i % c.size);
        truth[0].push_back(e.next), truth[1].push_back(e.x0);
        truth[2].push_back(e.grad_sample), truth[3].push_back(e.grad_model_output);
    }
    double sum = 0;
    const driver::DeviceArray<float>* results[4] = {&next, c.x0 ? &x0 : nullptr, &grad_sample, &grad_model};
    for (int k = 0; k < 4; ++k) {
        if (!results[k]) continue;
        const auto ours = results[k]->host();
        driver::expect_near(ours, truth[k], 3e-6);
        for (int64_t i = 0; i < n; ++i) sum += ours[i] * (1 + i % 7);
    }
    return sum;
}

}  // namespace

int main() {
    try {
        int flip = 0;
        for (const Case& c : all_cases(3001)) std::printf("%.17g\n", check(c, ++flip % 2 == 0));
    } catch (const std::exception& error) {
        std::printf("CheckFailed: %s\n", error.what());
        return 1;
    }
    std::printf("all held\n");
    return 0;
}
