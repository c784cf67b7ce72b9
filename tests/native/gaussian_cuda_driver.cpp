// SPDX-License-Identifier: Apache-2.0
// The Gaussian's GPU kernels on the emulator, against a plain loop: for the sanitizers and the orders of threads.
// Prints a checksum of every result.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "driver.h"
#include "gaussian/cuda.h"

using namespace medaccel::gaussian;

namespace {

struct Case {
    int64_t batch, channels, size[3];
    double sigma[3];
    Border border;
    bool adjoint;
    bool on_device;  // where σ lies
};

std::vector<double> along(const std::vector<double>& x, const Case& c, int axis) {
    const int r = radius_of(c.sigma[axis], 4.0);
    std::vector<double> taps(2 * r + 1), work(r + 2), y(x.size(), 0.0);
    fill_taps(c.sigma[axis], r, Approx::erf, false, taps.data(), nullptr, work.data());
    int64_t step = 1;
    for (int a = axis + 1; a < 3; ++a) step *= c.size[a];
    for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
        const int64_t at = i / step % c.size[axis], base = i - at * step;
        for (int k = -r; k <= r; ++k) {
            const int64_t source = border_source(at + k, c.size[axis], c.border);
            if (source < 0) continue;
            if (c.adjoint)
                y[base + source * step] += taps[k + r] * x[i];
            else
                y[i] += taps[k + r] * x[base + source * step];
        }
    }
    return y;
}

double check(const Case& c, int64_t chunks = 0) {
    const int64_t volume = c.size[0] * c.size[1] * c.size[2], n = c.batch * c.channels * volume;
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>((i * 2654435761u % 1000) / 500.0 - 1.0);
    const driver::DeviceArray<float> in(x), out(n), first(n), second(n);
    const driver::DeviceArray<double> sigma({c.sigma[0], c.sigma[1], c.sigma[2]});
    int reach = 0;
    for (double s : c.sigma) reach = std::max(reach, radius_of(s, 4.0));
    if (c.on_device) reach = 40;
    const driver::DeviceArray<unsigned char> work(workspace_bytes(reach));
    GpuCall call{};
    call.in = in.data();
    call.out = out.data();
    call.batch = c.batch;
    call.channels = c.channels;
    call.in_stride[0] = call.out_stride[0] = c.channels * volume;
    call.in_stride[1] = call.out_stride[1] = volume;
    for (int a = 0; a < 3; ++a) call.size[a] = c.size[a], call.host_sigma[a] = c.sigma[a];
    call.device_sigma = c.on_device ? sigma.data() : nullptr;
    call.truncated = 4.0;
    call.border = c.border;
    call.adjoint = c.adjoint;
    call.derivative_axis = -1;
    call.workspace = work.data();
    call.max_radius = reach;
    call.chunks = chunks;
    call.temporary[0] = first.data();
    call.temporary[1] = second.data();
    filter_gpu(call);
    std::vector<double> truth(x.begin(), x.end());
    for (int axis = 0; axis < 3; ++axis) {
        std::vector<double> next;
        for (int64_t o = 0; o < c.batch * c.channels; ++o) {
            const std::vector<double> part(truth.begin() + o * volume, truth.begin() + (o + 1) * volume);
            const auto filtered = along(part, c, axis);
            next.insert(next.end(), filtered.begin(), filtered.end());
        }
        truth = next;
    }
    const auto result = out.host();
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        driver::expect(std::fabs(result[i] - truth[i]) < 2e-6, "element " + std::to_string(i));
        sum += result[i] * (1 + i % 7);
    }
    return sum;
}

void check_dot() {
    std::vector<float> a(1000), b(1000);
    double truth = 0;
    for (int i = 0; i < 1000; ++i) a[i] = 0.001f * i, b[i] = 1.0f - a[i], truth += double(a[i]) * b[i];
    const driver::DeviceArray<float> x(a), y(b);
    const driver::DeviceArray<double> partial(kDotBlocks), total(1);
    dot_gpu(x.data(), y.data(), 1000, Storage::float32, partial.data(), total.data(), 0, nullptr);
    driver::expect(std::fabs(total.host()[0] - truth) < 1e-9, "dot product");
    std::printf("dot %.17g\n", total.host()[0]);
}

// Elements whose offset does not fit 32 bits, in memory of which only the touched pages exist.
void check_far_batch() {
    const int64_t far = (int64_t{1} << 31) + 64;
    driver::SparseMemory in((far + 64) * sizeof(float)), out((far + 64) * sizeof(float));
    float *near_in = in.open<float>(0, 20), *far_in = in.open<float>(far, 20);
    const float *near_out = out.open<float>(0, 20), *far_out = out.open<float>(far, 20);
    for (int i = 0; i < 20; ++i) near_in[i] = 1.0f, far_in[i] = 2.0f;
    const driver::DeviceArray<unsigned char> work(workspace_bytes(4));
    GpuCall call{};
    call.in = near_in;
    call.out = out.at<float>(0);
    call.batch = 2;
    call.channels = 1;
    call.in_stride[0] = call.out_stride[0] = far;
    call.in_stride[1] = call.out_stride[1] = 20;
    call.size[0] = call.size[1] = 1;
    call.size[2] = 20;
    call.host_sigma[2] = 1.0;
    call.truncated = 4.0;
    call.border = Border::nearest;
    call.normalize = true;
    call.derivative_axis = -1;
    call.workspace = work.data();
    call.max_radius = 4;
    filter_gpu(call);
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < 20; ++i) {
        driver::expect(std::fabs(near_out[i] - 1.0f) < 1e-6, "the near batch");
        driver::expect(std::fabs(far_out[i] - 2.0f) < 1e-6, "the far batch");
    }
}

}  // namespace

int main() {
    try {
        for (int border = 0; border < 5; ++border)
            for (int variant = 0; variant < 4; ++variant) {
                const auto b = static_cast<Border>(border);
                const bool adjoint = variant & 1, on_device = variant & 2;
                std::printf("%.17g\n", check({1, 2, {5, 6, 7}, {0.9, 0.5, 1.0}, b, adjoint, on_device}));
                std::printf("%.17g\n", check({1, 1, {3, 4, 12}, {2.0, 0.0, 1.7}, b, adjoint, on_device}));
                std::printf("%.17g\n", check({2, 1, {1, 5, 9}, {0.0, 1.0, 3.0}, b, adjoint, on_device}));
            }
        // Tiles that are cut, and chunks of one plane, of two and three, and of all.
        const Case cut{1, 1, {5, 34, 37}, {0.9, 2.0, 1.0}, Border::mirror, false, false};
        const double whole = check(cut, 1);
        for (int64_t chunks : {0, 2, 5}) driver::expect(check(cut, chunks) == whole, "the bits of another cut");
        std::printf("%.17g\n", whole);
        check_dot();
        check_far_batch();
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
        return 1;
    }
    std::printf("all held\n");
    return 0;
}
