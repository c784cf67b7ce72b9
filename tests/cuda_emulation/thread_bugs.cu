// SPDX-License-Identifier: Apache-2.0
// Bugs between threads: races, barriers, warps.
#include "planted_bugs.h"

namespace {

using driver::DeviceArray;

constexpr int kThreads = 64;

std::vector<float> ramp(int n) {
    std::vector<float> values(n);
    for (int i = 0; i < n; ++i) values[i] = static_cast<float>(i);
    return values;
}

// ---- Races ----

template <bool planted>
__global__ void rotate(const float* in, float* out) {
    SHARED(float, tile, [kThreads]);
    const int t = threadIdx.x;
    tile[t] = in[t];
    if (!planted) __syncthreads();
    out[t] = tile[(t + 1) % kThreads];
}

template <bool planted>
void missing_barrier() {
    DeviceArray<float> in(ramp(kThreads)), out(kThreads);
    LAUNCH(rotate<planted>, 1, kThreads, 0, nullptr, in.data(), out.data());
    driver::expect(out.host()[5] == 6.f, "rotated");
}

template <bool planted>
__global__ void histogram(int* out) {
    SHARED(int, bins, [4]);
    const int t = threadIdx.x;
    if (t < 4) bins[t] = 0;
    __syncthreads();
    if (planted) {
        bins[t % 4] += 1;
    } else {
        atomicAdd(&bins[t % 4], 1);
    }
    __syncthreads();
    if (t < 4) out[t] = bins[t];
}

template <bool planted>
void race_between_threads() {
    DeviceArray<int> out(4);
    LAUNCH(histogram<planted>, 1, kThreads, 0, nullptr, out.data());
    driver::expect(out.host()[3] == kThreads / 4, "counted");
}

template <bool planted>
__global__ void swap_neighbours(const float* in, float* out) {
    SHARED(float, tile, [32]);
    const int t = threadIdx.x;
    tile[t] = in[t];
    if (!planted) __syncwarp();
    out[t] = tile[t ^ 1];
}

template <bool planted>
void missing_syncwarp() {
    DeviceArray<float> in(ramp(32)), out(32);
    LAUNCH(swap_neighbours<planted>, 1, 32, 0, nullptr, in.data(), out.data());
    driver::expect(out.host()[4] == 5.f, "swapped");
}

template <bool planted>
__global__ void block_sums(float* out) {
    __syncthreads();  // orders a block's threads, never two blocks
    if (threadIdx.x == 0) out[planted ? blockIdx.x / 2 : blockIdx.x] = 1.f;
    __syncthreads();
}

template <bool planted>
void race_between_blocks() {
    DeviceArray<float> out(4);
    LAUNCH(block_sums<planted>, 4, 32, 0, nullptr, out.data());
    if (!planted) driver::expect_near(out.host(), {1, 1, 1, 1}, 0);
}

// The last block to arrive adds up what all blocks have written.
template <bool planted>
__global__ void sum_in_last_block(const float* in, float* partial, unsigned* arrived, float* out) {
    if (threadIdx.x != 0) return;
    partial[blockIdx.x] = in[blockIdx.x];
    if (!planted) __threadfence();
    const unsigned before = atomicAdd(arrived, 1u);
    if (before != gridDim.x - 1) return;
    if (!planted) __threadfence();
    float sum = 0.f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
}

template <bool planted>
void missing_fence() {
    DeviceArray<float> in(ramp(4)), partial(4), out(1);
    DeviceArray<unsigned> arrived(std::vector<unsigned>{0});
    LAUNCH(sum_in_last_block<planted>, 4, 32, 0, nullptr, in.data(), partial.data(), arrived.data(), out.data());
    driver::expect_near(out.host(), {6}, 0);
}

__global__ void add_one(float* x) { x[threadIdx.x] += 1.f; }

template <bool planted>
void race_between_streams() {
    cudaStream_t one, other;
    CUDA_CHECK(cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    DeviceArray<float> x(ramp(32));
    LAUNCH(add_one, 1, 32, 0, one, x.data());
    if (!planted) CUDA_CHECK(cudaStreamSynchronize(one));
    LAUNCH(add_one, 1, 32, 0, other, x.data());
    driver::expect(x.host()[7] == 9.f, "added twice");
    CUDA_CHECK(cudaStreamDestroy(one));
    CUDA_CHECK(cudaStreamDestroy(other));
}

template <bool planted>
void read_before_synchronising() {
    cudaStream_t stream;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    DeviceArray<float> x(ramp(32));
    LAUNCH(add_one, 1, 32, 0, stream, x.data());
    float result = 0.f;
    CUDA_CHECK(cudaMemcpyAsync(&result, x.data() + 7, sizeof result, cudaMemcpyDeviceToHost, stream));
    if (!planted) CUDA_CHECK(cudaStreamSynchronize(stream));
    driver::expect(result == 8.f, "added once");
    CUDA_CHECK(cudaStreamDestroy(stream));
}

// ---- Barriers ----

template <bool planted>
__global__ void halves(float* out) {
    if (planted && threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.f;
}

template <bool planted>
void barrier_divergence() {
    DeviceArray<float> out(kThreads);
    LAUNCH(halves<planted>, 1, kThreads, 0, nullptr, out.data());
    driver::expect_near(out.host(), std::vector<double>(kThreads, 1.), 0);
}

template <bool planted>
__global__ void half_of_a_warp_exchanges(float* out) {
    float v = threadIdx.x;
    if (!planted || threadIdx.x < 16) {
        v = __shfl_xor_sync(0xffffffffu, v, 1);  // waits for all 32 lanes
    } else {
        __syncthreads();  // waits for all threads
    }
    out[threadIdx.x] = v;
}

template <bool planted>
void deadlock() {
    DeviceArray<float> out(32);
    LAUNCH(half_of_a_warp_exchanges<planted>, 1, 32, 0, nullptr, out.data());
    driver::expect(out.host()[4] == 5.f, "exchanged");
}

// ---- Lane masks ----

template <bool planted>
__global__ void upper_lanes_vote(unsigned* out) {
    const unsigned upper = planted ? 0x0000ffffu : 0xffff0000u;
    if (threadIdx.x >= 16) out[threadIdx.x - 16] = __ballot_sync(upper, threadIdx.x % 2);
}

template <bool planted>
void wrong_lane_mask() {
    DeviceArray<unsigned> out(16);
    LAUNCH(upper_lanes_vote<planted>, 1, 32, 0, nullptr, out.data());
    driver::expect(out.host()[0] == 0xaaaa0000u, "voted");
}

template <bool planted>
__global__ void lanes_at_two_places(float* out) {
    float v = threadIdx.x;
    if (planted && threadIdx.x % 2) {
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    } else {
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    }
    out[threadIdx.x] = v;
}

template <bool planted>
void divergent_shuffle() {
    DeviceArray<float> out(32);
    LAUNCH(lanes_at_two_places<planted>, 1, 32, 0, nullptr, out.data());
    driver::expect(out.host()[4] == 5.f, "exchanged");
}

template <bool planted>
__global__ void broadcast(float* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f + threadIdx.x, planted ? 20 : 4);
}

template <bool planted>
void undefined_lane() {
    DeviceArray<float> out(16);
    LAUNCH(broadcast<planted>, 1, 32, 0, nullptr, out.data());
    driver::expect_near(out.host(), std::vector<double>(16, 5.), 0);
}

}  // namespace

std::vector<Twins> thread_bugs() {
    return {TWINS(missing_barrier),           TWINS(race_between_threads), TWINS(missing_syncwarp),
            TWINS(race_between_blocks),       TWINS(missing_fence),        TWINS(race_between_streams),
            TWINS(read_before_synchronising), TWINS(barrier_divergence),   TWINS(deadlock),
            TWINS(wrong_lane_mask),           TWINS(divergent_shuffle),    TWINS(undefined_lane)};
}
