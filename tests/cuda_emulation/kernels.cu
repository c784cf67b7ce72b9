// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include "common/cuda_portable.h"

namespace kernels {
namespace {

constexpr int kTile = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

__global__ void laplacian_kernel(const float* __restrict__ in, float* __restrict__ out, int depth, int height,
                                 int width) {
    SHARED(float, tile, [kTile + 2][kTile + 2]);
    const int x = blockIdx.x * kTile + threadIdx.x, y = blockIdx.y * kTile + threadIdx.y, z = blockIdx.z;
    const int row = threadIdx.y + 1, column = threadIdx.x + 1;
    const auto load = [&](int k, int j, int i) {
        const bool inside = k >= 0 && k < depth && j >= 0 && j < height && i >= 0 && i < width;
        return inside ? __ldg(in + (std::int64_t{k} * height + j) * width + i) : 0.f;
    };
    tile[row][column] = load(z, y, x);
    if (threadIdx.x == 0) tile[row][0] = load(z, y, x - 1);
    if (threadIdx.x == kTile - 1) tile[row][kTile + 1] = load(z, y, x + 1);
    if (threadIdx.y == 0) tile[0][column] = load(z, y - 1, x);
    if (threadIdx.y == kTile - 1) tile[kTile + 1][column] = load(z, y + 1, x);
    __syncthreads();
    if (x >= width || y >= height) return;
    const float across =
        tile[row][column - 1] + tile[row][column + 1] + tile[row - 1][column] + tile[row + 1][column];
    const float along = load(z - 1, y, x) + load(z + 1, y, x);
    out[(std::int64_t{z} * height + y) * width + x] = across + along - 6.f * tile[row][column];
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const T* in, T* out, std::int64_t columns) {
    SHARED(T, of_warp, [kThreads / 32]);
    T sum = 0;
    for (std::int64_t i = threadIdx.x; i < columns; i += kThreads) sum += in[blockIdx.x * columns + i];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(kAllLanes, sum, distance);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    T total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += of_warp[warp];
    out[blockIdx.x] = total;
}

__global__ void scan_kernel(const int* in, int* out, int n) {
    DYN_SHARED(int, sums);
    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    sums[t] = i < n ? in[i] : 0;
    __syncthreads();
    for (int distance = 1; distance < static_cast<int>(blockDim.x); distance *= 2) {
        const int before = t >= distance ? sums[t - distance] : 0;
        __syncthreads();
        sums[t] += before;
        __syncthreads();
    }
    if (i < n) out[i] = sums[t];
}

__global__ void scale_kernel(const float* in, float* out, std::int64_t n, float scale) {
    const std::int64_t i = 4 * (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
    if (i + 4 <= n) {
        const float4 v = *reinterpret_cast<const float4*>(in + i);
        *reinterpret_cast<float4*>(out + i) = make_float4(scale * v.x, scale * v.y, scale * v.z, scale * v.w);
    } else {
        for (std::int64_t j = i; j < n; ++j) out[j] = scale * in[j];
    }
}

__global__ void to_half_kernel(const float* in, std::uint16_t* half, int n, bool bfloat16) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half[i] = bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(in[i])) : __half_as_ushort(__float2half_rn(in[i]));
}

__global__ void from_half_kernel(const std::uint16_t* half, float* out, int n, bool bfloat16) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = bfloat16 ? __bfloat162float(__ushort_as_bfloat16(half[i])) : __half2float(__ushort_as_half(half[i]));
}

__global__ void sum_kernel(const float* in, float* partial, unsigned* arrived, float* out, int n) {
    SHARED(bool, is_last, );
    if (threadIdx.x == 0) {
        float sum = 0.f;
        for (int i = blockIdx.x; i < n; i += gridDim.x) sum += in[i];
        partial[blockIdx.x] = sum;
        __threadfence();
        is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    float total = 0.f;
    for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
    *out = total;
}

__global__ void warp_kernel(const int* in, int* out) {
    const int lane = threadIdx.x, v = in[lane];
    const auto store = [&](int result, int value) { out[result * 32 + lane] = value; };
    store(0, __shfl_sync(kAllLanes, v, 5));
    store(1, __shfl_up_sync(kAllLanes, v, 3));
    store(2, __shfl_down_sync(kAllLanes, v, 3));
    store(3, __shfl_xor_sync(kAllLanes, v, 6));
    store(4, __shfl_sync(kAllLanes, v, 9, 8));  // segments of 8: lane 1 of its own
    store(5, __shfl_down_sync(kAllLanes, v, 3, 8));
    store(6, static_cast<int>(__ballot_sync(kAllLanes, v < 0)));
    store(7, __any_sync(kAllLanes, v == 7) + 2 * __all_sync(kAllLanes, v < 100));
    store(8, __reduce_add_sync(kAllLanes, v));
    store(9, __reduce_min_sync(kAllLanes, v));
    store(10, __reduce_max_sync(kAllLanes, v));
    store(11, static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<double>(v), 1)));
    __syncwarp();
}

__global__ void atomic_kernel(const int* in, int* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    atomicAdd(&out[0], in[i]);
    atomicMin(&out[1], in[i]);
    atomicMax(&out[2], in[i]);
}

__global__ void number_kernel(std::int64_t* out) {
    DYN_SHARED(std::int64_t, numbers);
    const std::int64_t z = blockIdx.z * blockDim.z + threadIdx.z, y = blockIdx.y * blockDim.y + threadIdx.y;
    const std::int64_t x = blockIdx.x * blockDim.x + threadIdx.x, width = gridDim.x * blockDim.x;
    const std::int64_t i = (z * gridDim.y * blockDim.y + y) * width + x;
    numbers[(threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = i;
    out[i] = numbers[(threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x];
}

unsigned blocks_for(std::int64_t n, int threads) { return static_cast<unsigned>((n + threads - 1) / threads); }

}  // namespace

void laplacian(const float* in, float* out, int depth, int height, int width, void* stream) {
    const dim3 grid(blocks_for(width, kTile), blocks_for(height, kTile), depth);
    LAUNCH(laplacian_kernel, grid, dim3(kTile, kTile), 0, stream, in, out, depth, height, width);
}

template <class T>
void row_sums(const T* in, T* out, int rows, std::int64_t columns, void* stream) {
    LAUNCH((row_sums_kernel<T, 96>), rows, 96, 0, stream, in, out, columns);
}
template void row_sums(const float*, float*, int, std::int64_t, void*);
template void row_sums(const double*, double*, int, std::int64_t, void*);

void scan(const int* in, int* out, int n, int threads, void* stream) {
    LAUNCH(scan_kernel, blocks_for(n, threads), threads, threads * sizeof(int), stream, in, out, n);
}

void scale_by_four(const float* in, float* out, std::int64_t n, float scale, void* stream) {
    LAUNCH(scale_kernel, blocks_for((n + 3) / 4, 32), 32, 0, stream, in, out, n, scale);
}

void to_half(const float* in, std::uint16_t* half, int n, bool bfloat16, void* stream) {
    LAUNCH(to_half_kernel, blocks_for(n, 256), 256, 0, stream, in, half, n, bfloat16);
}

void from_half(const std::uint16_t* half, float* out, int n, bool bfloat16, void* stream) {
    LAUNCH(from_half_kernel, blocks_for(n, 256), 256, 0, stream, half, out, n, bfloat16);
}

void sum_in_one_pass(const float* in, float* partial, unsigned* arrived, float* out, int n, void* stream) {
    LAUNCH(sum_kernel, 5, 32, 0, stream, in, partial, arrived, out, n);
}

void warp_functions(const int* in, int* out, void* stream) { LAUNCH(warp_kernel, 1, 32, 0, stream, in, out); }

void atomic_functions(const int* in, int* out, int n, void* stream) {
    LAUNCH(atomic_kernel, blocks_for(n, 64), 64, 0, stream, in, out, n);
}

void number_cells(std::int64_t* out, int size, void* stream) {
    constexpr int kBytes = 100 << 10;
    CUDA_CHECK(cudaFuncSetAttribute(number_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    const unsigned blocks = blocks_for(size, 4);
    LAUNCH(number_kernel, dim3(blocks, blocks, blocks), dim3(4, 4, 4), kBytes, stream, out);
}

}  // namespace kernels
