// SPDX-License-Identifier: Apache-2.0
// Instance norm's GPU kernels on the emulator, against plain loops in double: for the sanitizers and the orders of
// threads. Prints a checksum of every result.
#include <cmath>
#include <cstdio>
#include <vector>

#include "driver.h"
#include "instance_norm/cuda.h"

using namespace medaccel::instance_norm;
using driver::DeviceArray;

namespace {

struct Case {
    int64_t batch, channels, voxels;
    bool last, residual, affine, activate;
    double slope;
    int64_t slices;  // the gradient is one of so many slices of a wider map
    int64_t offset;  // of the input in its memory, in elements: 1 rules vectors out
    bool at_once;
};

float random_at(int64_t i, unsigned seed) {
    const auto word = static_cast<unsigned>(i * 2654435761u + seed * 40503u);
    return static_cast<float>((word ^ word >> 15) % 4001) / 1000.0f - 2.0f;
}

std::vector<float> randoms(int64_t n, unsigned seed) {
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; ++i) values[i] = random_at(i, seed);
    return values;
}

double near(const char* what, const std::vector<float>& actual, const std::vector<double>& truth) {
    double sum = 0;
    for (std::size_t i = 0; i < truth.size(); ++i) {
        driver::expect(std::fabs(actual[i] - truth[i]) <= 2e-5 * std::fmax(1.0, std::fabs(truth[i])),
                       std::string(what) + " " + std::to_string(i) + " is " + std::to_string(actual[i]) +
                           ", expected " + std::to_string(truth[i]));
        sum += actual[i] * static_cast<double>(1 + i % 7);
    }
    return sum;
}

void check(const Case& c) {
    const int64_t n = c.batch * c.channels * c.voxels, rows = c.batch * c.channels;
    const GpuProblem p{
        {c.batch, c.channels, c.voxels, c.last, 1e-5, c.activate, c.slope, 1}, Storage::float32, 0, nullptr};
    driver::expect(in_one_launch(p) == c.at_once, "the number of launches");
    const auto x = randoms(n + c.offset, 1), added = randoms(n, 2), wide = randoms(n * c.slices, 3);
    const auto weight = randoms(c.channels, 4), bias = randoms(c.channels, 5);
    const DeviceArray<float> in(x), residual(added), grad(wide), w(weight), b(bias);
    const DeviceArray<float> out(n), mean(rows), rstd(rows), grad_in(n), grad_w(c.channels), grad_b(c.channels);
    const DeviceArray<float> grad_residual(n);
    const DeviceArray<unsigned char> work(forward_bytes(p)), back(backward_bytes(p));
    const float* given = in.data() + c.offset;
    const float* extra = c.residual ? residual.data() : nullptr;
    const float *scale = c.affine ? w.data() : nullptr, *shift = c.affine ? b.data() : nullptr;
    forward_gpu(p, given, scale, shift, extra, out.data(), mean.data(), rstd.data(), work.data());

    // The last of the slices, along the channels.
    const int64_t pitch = c.last ? c.channels * c.slices : c.voxels, batch_stride = c.channels * c.voxels * c.slices;
    const int64_t first = (c.slices - 1) * c.channels * (c.last ? 1 : c.voxels);
    const Sign sign = !c.residual ? Sign::recompute : c.slope >= 0 ? Sign::from_output : Sign::with_residual;
    const float* signs = sign == Sign::recompute ? nullptr : sign == Sign::from_output ? out.data() : extra;
    backward_gpu(p, {grad.data() + first, batch_stride, pitch}, given, scale, shift, signs, sign, mean.data(),
                 rstd.data(), grad_in.data(), c.affine ? grad_w.data() : nullptr, c.affine ? grad_b.data() : nullptr,
                 c.residual ? grad_residual.data() : nullptr, back.data());

    std::vector<double> y(n), gx(n), gr(n), gw(c.channels, 0.0), gb(c.channels, 0.0);
    const double slope = c.activate ? c.slope : 1;
    for (int64_t s = 0; s < c.batch; ++s)
        for (int64_t k = 0; k < c.channels; ++k) {
            const auto at = [&](int64_t v) {
                return c.last ? (s * c.voxels + v) * c.channels + k : (s * c.channels + k) * c.voxels + v;
            };
            const auto g_at = [&](int64_t v) {
                return wide[first + s * batch_stride + (c.last ? v * pitch + k : k * pitch + v)];
            };
            double m = 0, square = 0, sum = 0, product = 0;
            const auto size = static_cast<double>(c.voxels);
            for (int64_t v = 0; v < c.voxels; ++v) m += x[c.offset + at(v)] / size;
            for (int64_t v = 0; v < c.voxels; ++v)
                square += (x[c.offset + at(v)] - m) * (x[c.offset + at(v)] - m) / size;
            const double inverse = 1 / std::sqrt(square + 1e-5), factor = c.affine ? weight[k] : 1.0;
            for (int64_t v = 0; v < c.voxels; ++v) {
                const double normal = (x[c.offset + at(v)] - m) * inverse;
                const double before =
                    normal * factor + (c.affine ? bias[k] : 0.0) + (c.residual ? added[at(v)] : 0.0);
                y[at(v)] = before > 0 ? before : slope * before;
                gr[at(v)] = g_at(v) * (before > 0 ? 1 : slope);
                sum += gr[at(v)], product += gr[at(v)] * normal;
            }
            gb[k] += sum, gw[k] += product;
            for (int64_t v = 0; v < c.voxels; ++v) {
                const double normal = (x[c.offset + at(v)] - m) * inverse;
                gx[at(v)] = factor * inverse * (gr[at(v)] - sum / size - normal * product / size);
            }
        }
    double total = near("output", out.host(), y) + near("input's gradient", grad_in.host(), gx);
    if (c.affine) total += near("weight's gradient", grad_w.host(), gw) + near("bias' gradient", grad_b.host(), gb);
    if (c.residual) total += near("residual's gradient", grad_residual.host(), gr);
    std::printf("%.17g\n", total);
}

// A batch whose offset does not fit 32 bits, in memory of which only the touched pages exist.
void check_far_gradient() {
    const int64_t far = (int64_t{1} << 31) + 64, voxels = 40;
    driver::SparseMemory memory((far + 64) * sizeof(float));
    const float* grad = memory.open<float>(0, voxels);
    for (int64_t place : {int64_t{0}, far}) {
        float* const part = memory.open<float>(place, voxels);
        for (int64_t i = 0; i < voxels; ++i) part[i] = i == 0 ? 1.0f : 0.0f;
    }
    const GpuProblem p{{2, 1, voxels, false, 1e-5, false, 0, 1}, Storage::float32, 0, nullptr};
    const DeviceArray<float> in(randoms(2 * voxels, 1)), out(2 * voxels), mean(2), rstd(2), grad_in(2 * voxels);
    const DeviceArray<float> grad_w(1), grad_b(1);
    const DeviceArray<unsigned char> work(forward_bytes(p)), back(backward_bytes(p));
    forward_gpu(p, in.data(), nullptr, nullptr, nullptr, out.data(), mean.data(), rstd.data(), work.data());
    backward_gpu(p, {grad, far, voxels}, in.data(), nullptr, nullptr, nullptr, Sign::recompute, mean.data(),
                 rstd.data(), grad_in.data(), grad_w.data(), grad_b.data(), nullptr, back.data());
    driver::expect(std::fabs(grad_b.host()[0] - 2.0f) < 1e-6, "both samples' gradients are added up");
}

}  // namespace

int main() {
    try {
        for (int variant = 0; variant < 8; ++variant) {
            const bool residual = variant & 1, affine = variant & 2, negative = variant & 4;
            const double slope = negative ? -0.4 : 0.1;
            // An instance a block: vectors, single elements, more channels than one group has, misaligned memory.
            check({2, 3, 40, false, residual, affine, true, slope, 2, 0, true});
            check({2, 20, 35, true, residual, affine, true, slope, 2, 0, true});
            check({1, 37, 27, true, residual, affine, !negative, slope, 1, 0, true});
            check({1, 2, 304, false, residual, affine, true, slope, 1, 1, true});
        }
        // An instance in many blocks.
        check({1, 2, 20480, false, true, true, true, 0.1, 1, 0, false});
        check({1, 1, 17001, false, false, false, true, 0.1, 1, 0, false});
        check({1, 24, 1501, true, true, true, true, -0.4, 2, 0, false});
        check({2, 13, 1700, true, false, true, true, 0.1, 1, 0, false});
        check({1, 300, 1030, true, true, false, false, 0.0, 1, 0, false});
        check_far_gradient();
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
        return 1;
    }
    std::printf("all held\n");
    return 0;
}
