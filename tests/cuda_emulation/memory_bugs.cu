// SPDX-License-Identifier: Apache-2.0
// Bugs of addressing: outside an array, misaligned, beyond 32 bits, never written.
#include "planted_bugs.h"

namespace {

using driver::DeviceArray;

constexpr int kThreads = 64;

std::vector<float> ramp(int n) {
    std::vector<float> values(n);
    for (int i = 0; i < n; ++i) values[i] = static_cast<float>(i);
    return values;
}

std::vector<double> expected_ramp(int n, double offset = 0) {
    std::vector<double> values(n);
    for (int i = 0; i < n; ++i) values[i] = i + offset;
    return values;
}

// ---- The last block is not full, and nobody looks ----

template <bool planted>
__global__ void copy_tail(const float* in, float* out, int n) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (planted || i < n) out[i < n ? i : 0] = in[i];
}

template <bool planted>
void global_out_of_bounds() {
    const int n = kThreads + 37;
    DeviceArray<float> in(ramp(n)), out(n);
    LAUNCH(copy_tail<planted>, 2, kThreads, 0, nullptr, in.data(), out.data(), n);
    if (!planted) driver::expect_near(out.host(), expected_ramp(n), 0);
}

// ---- The slice below the first: 40,000 bytes off, far beyond ASan's own red zone ----

template <bool planted>
__global__ void difference_of_slices(const float* in, float* out, int slice, int n) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= n) return;
    const float below = planted || i >= slice ? in[i - slice] : in[i];
    out[i] = in[i] - below;
}

template <bool planted>
void global_out_of_bounds_by_a_slice() {
    const int slice = 10000, n = 2 * slice;
    DeviceArray<float> in(ramp(n)), out(n);
    LAUNCH(difference_of_slices<planted>, (n + kThreads - 1) / kThreads, kThreads, 0, nullptr, in.data(), out.data(),
           slice, n);
    std::vector<double> expected(n, 0.);
    for (int i = slice; i < n; ++i) expected[i] = slice;
    driver::expect_near(out.host(), expected, 0);
}

// ---- One element too few in shared memory, static and dynamic ----

template <bool planted>
__global__ void reverse_static(const float* in, float* out) {
    SHARED(float, tile, [planted ? kThreads - 1 : kThreads]);
    const int t = threadIdx.x;
    tile[t] = in[t];
    __syncthreads();
    out[t] = tile[kThreads - 1 - t];
}

__global__ void reverse_dynamic(const float* in, float* out) {
    DYN_SHARED(float, tile);
    const int t = threadIdx.x;
    tile[t] = in[t];
    __syncthreads();
    out[t] = tile[kThreads - 1 - t];
}

void expect_reversed(const std::vector<float>& out) {
    std::vector<double> expected(out.size());
    for (std::size_t i = 0; i < out.size(); ++i) expected[i] = static_cast<double>(out.size() - 1 - i);
    driver::expect_near(out, expected, 0);
}

template <bool planted>
void shared_out_of_bounds() {
    DeviceArray<float> in(ramp(kThreads)), out(kThreads);
    LAUNCH(reverse_static<planted>, 1, kThreads, 0, nullptr, in.data(), out.data());
    expect_reversed(out.host());
}

template <bool planted>
void dynamic_shared_out_of_bounds() {
    DeviceArray<float> in(ramp(kThreads)), out(kThreads);
    const int count = planted ? kThreads - 1 : kThreads;
    LAUNCH(reverse_dynamic, 1, kThreads, count * sizeof(float), nullptr, in.data(), out.data());
    expect_reversed(out.host());
}

// A row too far, through a pointer: no index for UBSan to check, and beyond the array's red zone on a narrower one.
template <bool planted>
__global__ void sum_of_next_row(float* out) {
    SHARED(float, tile, [4][32]);
    const int t = threadIdx.x;
    for (int row = 0; row < 4; ++row) tile[row][t] = 1.f;
    __syncthreads();
    const float* next = &tile[0][0] + (planted ? 4 : 3) * 32;
    out[t] = next[t];
}

template <bool planted>
void shared_row_out_of_bounds() {
    DeviceArray<float> out(32);
    LAUNCH(sum_of_next_row<planted>, 1, 32, 0, nullptr, out.data());
    driver::expect_near(out.host(), std::vector<double>(32, 1.), 0);
}

// ---- Shared memory that one thread forgot ----

template <bool planted>
__global__ void shift_through_shared(const float* in, float* out) {
    SHARED(float, tile, [kThreads + 1]);
    const int t = threadIdx.x;
    tile[t] = in[t];
    if (!planted && t == 0) tile[kThreads] = kThreads;
    __syncthreads();
    out[t] = tile[t + 1];
}

template <bool planted>
void uninitialised_shared() {
    DeviceArray<float> in(ramp(kThreads)), out(kThreads);
    LAUNCH(shift_through_shared<planted>, 1, kThreads, 0, nullptr, in.data(), out.data());
    driver::expect_near(out.host(), expected_ramp(kThreads, 1), 0);
}

// ---- Vector loads where the address is a multiple of 4 bytes, not of 16 ----

template <bool planted>
__global__ void sum_of_four(const float* in, float* out) {
    const float* row = in + 1;  // a row of an odd number of elements begins anywhere
    if (planted) {
        const float4 v = *reinterpret_cast<const float4*>(row);
        out[0] = v.x + v.y + v.z + v.w;
    } else {
        out[0] = row[0] + row[1] + row[2] + row[3];
    }
}

template <bool planted>
void misaligned_load() {
    DeviceArray<float> in(ramp(8)), out(1);
    LAUNCH(sum_of_four<planted>, 1, 1, 0, nullptr, in.data(), out.data());
    driver::expect_near(out.host(), {10}, 0);
}

// Shared memory has the alignment of its type and no more, though the compiler may happen to give more.
template <bool planted>
__global__ void copy_by_four(const float* in, float* out) {
    using Element = std::conditional_t<planted, float, float4>;
    SHARED(Element, tile, [planted ? 16 : 4]);
    float4* rows = reinterpret_cast<float4*>(tile);
    const int t = threadIdx.x;
    rows[t] = *reinterpret_cast<const float4*>(in + 4 * t);
    __syncthreads();
    *reinterpret_cast<float4*>(out + 4 * t) = rows[t];
}

template <bool planted>
void misaligned_shared() {
    DeviceArray<float> in(ramp(16)), out(16);
    LAUNCH(copy_by_four<planted>, 1, 4, 0, nullptr, in.data(), out.data());
    driver::expect_near(out.host(), expected_ramp(16), 0);
}

// ---- A batch whose second sample begins beyond 2^31 elements ----

template <class Index>
__global__ void scale_batch(float* x, Index batch_stride, int n) {
    const Index i = static_cast<Index>(blockIdx.x) * batch_stride + static_cast<Index>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < n) x[i] = 2 * x[i];
}

template <bool planted>
__global__ void scale_batch_truncated(float* x, std::int64_t batch_stride, int n) {
    using Index = std::conditional_t<planted, int, std::int64_t>;
    const Index i = static_cast<Index>(blockIdx.x * batch_stride + threadIdx.x);
    if (static_cast<int>(threadIdx.x) < n) x[i] = 2 * x[i];
}

// `samples` samples of 8 elements, `stride` apart; launch(x) must double them all.
template <class Launch>
void check_sparse_batch(int samples, std::int64_t stride, const Launch& launch) {
    const int n = 8;
    driver::SparseMemory memory((samples - 1) * stride * sizeof(float) + n * sizeof(float));
    for (int b = 0; b < samples; ++b) {
        float* x = memory.open<float>(b * stride, n);
        for (int i = 0; i < n; ++i) x[i] = static_cast<float>(b * n + i);
    }
    launch(memory.at<float>(0), n);
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int b = 0; b < samples; ++b) {
        for (int i = 0; i < n; ++i)
            driver::expect(*memory.at<float>(b * stride + i) == 2 * (b * n + i), "not doubled");
    }
}

template <bool planted>
void int32_overflow() {  // the product of block and stride overflows
    using Index = std::conditional_t<planted, int, std::int64_t>;
    constexpr int kStride = (1 << 30) + 16;
    check_sparse_batch(3, kStride,
                       [](float* x, int n) { LAUNCH(scale_batch<Index>, 3, 32, 0, nullptr, x, Index{kStride}, n); });
}

template <bool planted>
void int32_truncation() {  // the offset is right, and then cut to 32 bits
    constexpr std::int64_t kStride = (std::int64_t{1} << 31) + 16;
    check_sparse_batch(2, kStride, [](float* x, int n) {
        LAUNCH(scale_batch_truncated<planted>, 2, 32, 0, nullptr, x, kStride, n);
    });
}

// ---- An element that no thread writes ----

template <bool planted>
void unwritten_output() {
    const int n = 100;
    DeviceArray<float> in(ramp(n)), out(n);
    const int blocks = planted ? n / kThreads : (n + kThreads - 1) / kThreads;
    LAUNCH(copy_tail<false>, blocks, kThreads, 0, nullptr, in.data(), out.data(), n);
    driver::expect_near(out.host(), expected_ramp(n), 0);
}

// ---- A stencil whose halo is one element short on the right: zero is read where there is data ----

template <bool planted>
__global__ void box_filter(const float* in, float* out, int n) {
    constexpr int kRadius = 2;
    SHARED(float, tile, [kThreads + 2 * kRadius]);
    const int begin = blockIdx.x * kThreads - kRadius;
    for (int j = threadIdx.x; j < kThreads + 2 * kRadius; j += kThreads) {
        const int i = begin + j;
        const bool inside = i >= 0 && i < n && (!planted || j < kThreads + 2 * kRadius - 1);
        tile[j] = inside ? in[i] : 0.f;
    }
    __syncthreads();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= n) return;
    float sum = 0.f;
    for (int k = 0; k <= 2 * kRadius; ++k) sum += tile[threadIdx.x + k];
    out[i] = sum;
}

template <bool planted>
void halo_off_by_one() {
    const int n = 150;
    DeviceArray<float> in(ramp(n)), out(n);
    LAUNCH(box_filter<planted>, 3, kThreads, 0, nullptr, in.data(), out.data(), n);
    std::vector<double> expected(n, 0.);
    for (int i = 0; i < n; ++i) {
        for (int j = std::max(i - 2, 0); j <= std::min(i + 2, n - 1); ++j) expected[i] += j;
    }
    driver::expect_near(out.host(), expected, 1e-4);
}

}  // namespace

std::vector<Twins> memory_bugs() {
    return {TWINS(global_out_of_bounds),     TWINS(global_out_of_bounds_by_a_slice),
            TWINS(shared_out_of_bounds),     TWINS(dynamic_shared_out_of_bounds),
            TWINS(shared_row_out_of_bounds), TWINS(uninitialised_shared),
            TWINS(misaligned_load),          TWINS(misaligned_shared),
            TWINS(int32_overflow),           TWINS(int32_truncation),
            TWINS(unwritten_output),         TWINS(halo_off_by_one)};
}
