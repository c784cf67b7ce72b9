// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter's GPU kernels.
//
//   make_taps   radius and taps of each axis, from σ on the device or from the host
//   march       all three axes in one pass over the volume, for radii up to R
//   one_axis    one axis a pass, any radius; also the adjoint of folding borders
//   dot.h       the inner product that the gradient to σ ends in
//
// Bytes: three plain passes request 3 reads and 3 writes of the volume. `march` reads a tile of 32 × 32 columns with
// its halo, once a plane, and writes the output once: at radius 8 and chunks of 64 planes it requests
// (48·48)/(32·32) · (64 + 16)/64 + 1 = 3.81 volumes; halos that a neighbouring block has just read come from the
// second-level cache, so that the DRAM sees little more than 2. What takes the time is the instructions
// (docs/gpu.md).
#include <type_traits>

#include "../common/cuda_portable.h"
#include "../common/cuda_storage.h"
#include "cuda.h"
#include "dot.h"

namespace medaccel::gaussian {
namespace {

constexpr int kThreads = 256, kTileX = kMarchTile;

// What the kernels know of the volume.
struct Volume {
    int64_t channels, in_stride[2], out_stride[2];
    int64_t size[3];
};

template <class C>
struct Taps {
    const int* radius;  // [3]
    const C* taps;      // [3][2][2 · max_radius + 1]: taps, derivative
    int max_radius;
    int derivative_axis;

    __device__ const C* of(int axis) const {
        return taps + (2 * axis + (axis == derivative_axis)) * static_cast<int64_t>(2 * max_radius + 1);
    }
    __device__ int reach() const { return max(max(radius[0], radius[1]), radius[2]); }
};

// --- taps --------------------------------------------------------------------------------------------------------
struct HostSigma {
    double value[3];
};

// One block an axis.
template <class C>
__global__ void __launch_bounds__(128, 1)
    make_taps(const double* device_sigma, HostSigma host_sigma, double truncated, Approx approx, bool normalize,
              int max_radius, double* work, int* radius, C* taps) {
    SHARED(double, sums, [2]);
    const int axis = blockIdx.x;
    const double sigma = device_sigma ? device_sigma[axis] : host_sigma.value[axis];
    C* t = taps + 2 * axis * static_cast<int64_t>(2 * max_radius + 1);
    C* d = t + 2 * max_radius + 1;
    double* half = work + axis * static_cast<int64_t>(max_radius + 2);
    const bool valid = sigma >= 0 && truncated * sigma < max_radius + 0.5;
    const int r = valid ? radius_of(sigma, truncated) : 0;
    if (threadIdx.x == 0) radius[axis] = r;
    if (r == 0) {  // the identity; or a σ that no kernel can follow: NaN everywhere
        if (threadIdx.x == 0) {
            t[0] = valid ? C(1) : C(NAN);
            d[0] = valid ? C(0) : C(NAN);
        }
        return;
    }
    if (approx == Approx::scalespace) {
        if (threadIdx.x == 0) scalespace_half(sigma, r, half);
        __syncthreads();
    }
    // Separate sweeps, each with one call in flight: together they would spill registers around the calls.
    if (threadIdx.x == 0) {
        double sum = 0.0;
#pragma unroll 1
        for (int k = -r; normalize && k <= r; ++k) sum += tap_at(approx, k, sigma, half);
        sums[0] = normalize ? sum : 1.0;
    }
    if (threadIdx.x == 32) {
        double slope = 0.0;
#pragma unroll 1
        for (int k = -r; normalize && k <= r; ++k) slope += derivative_at(approx, k, sigma, half);
        sums[1] = slope;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i <= 2 * r; i += blockDim.x)
        t[i] = static_cast<C>(tap_at(approx, i - r, sigma, half) / sums[0]);
#pragma unroll 1
    for (int i = threadIdx.x; i <= 2 * r; i += blockDim.x) {
        double slope = derivative_at(approx, i - r, sigma, half);
        if (normalize) slope -= static_cast<double>(t[i]) * sums[1];
        d[i] = static_cast<C>(slope / sums[0]);
    }
}

// --- the fused march ---------------------------------------------------------------------------------------------
// A block owns a tile of columns and a chunk of planes. Each plane, with its halo, goes through shared memory for x
// and y; along z a thread carries the partial sums of its columns' next 2R + 1 outputs in registers and shifts them
// by one a plane (the transposed form of the filter), so no plane is kept. An output is summed up in the order of its
// taps, so its bits depend neither on tile and chunk nor on R.
template <int R>
struct Tile {
    static constexpr int columns = 4;  // of a thread: their sums along z are most of its registers
    static constexpr int height = kThreads / kTileX * columns;
    static_assert(height == kMarchTile, "plan_march counts these tiles");
    static constexpr int rows = height + 2 * R, pitch = kTileX + 2 * R;  // with the halo
    static constexpr int quads = rows * pitch / 4, of_thread = (quads + kThreads - 1) / kThreads;
    static constexpr int taps = 2 * R + 1, tap_quads = taps / 4 + 1;
};

// Where a block's tile lies. What the border does to rows and columns is worked out once, not once a plane.
template <class T, int R>
struct Place {
    const T* in;
    T* out;  // this thread's first column in the chunk's first plane
    int64_t plane;
    int depth, z0, z1;
    int width, x0;          // of the volume; of the tile
    int out_rows;           // of the thread's columns lie in the volume
    bool aligned;           // rows begin at multiples of four elements
    const int64_t* row_at;  // [rows] offset in a plane, or −1: zeros, or never read
    const int* column_at;   // [pitch] or −1
};

template <class T, int R>
__device__ inline void fetch(const Place<T, R>& p, int source, Quad<T> (&fetched)[Tile<R>::of_thread]) {
    const T* from = p.in + source * p.plane;
#pragma unroll
    for (int n = 0; n < Tile<R>::of_thread; ++n) {
        const int i = threadIdx.x + n * kThreads;
        if ((n + 1) * kThreads > Tile<R>::quads && i >= Tile<R>::quads) continue;
        const int row = i / (Tile<R>::pitch / 4), quad = i % (Tile<R>::pitch / 4), x = p.x0 - R + 4 * quad;
        const int64_t at = p.row_at[row];
        fetched[n] = {};
        if (at < 0) continue;
        if (p.aligned && x >= 0 && x + 4 <= p.width) {
            fetched[n] = *reinterpret_cast<const Quad<T>*>(from + at + x);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (p.column_at[4 * quad + j] >= 0) fetched[n].v[j] = from[at + p.column_at[4 * quad + j]];
        }
    }
}

// The same number, but the compiler can't know it, and so keeps nothing that follows from it across a loop.
__device__ inline int opaque(int value) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Full: all three radii are R, as the compiler then knows. Taps beyond a smaller radius are skipped, not zeros that
// are multiplied: 0 · NaN is NaN.
//   taps: z from the last to the first, y from the first, x with its centre at R
template <class T, int R, bool Full>
__device__ inline void march_planes(const Place<T, R>& p, const int* radius, Border border, Quad<float>* tile,
                                    Quad<float>* lines, const Quad<float> (*taps)[Tile<R>::tap_quads]) {
    using S = Tile<R>;
    const int rz = Full ? R : radius[0];
    const auto source_of = [&](int plane) {
        return plane < p.z1 + rz ? static_cast<int>(border_source(plane, p.depth, border)) : -1;
    };
    const int column = threadIdx.x % kTileX, first_row = threadIdx.x / kTileX * S::columns;
    float sums[S::columns][S::taps] = {};
    Quad<T> fetched[S::of_thread] = {};
    T* to = p.out;
    int source = source_of(p.z0 - rz);
    if (source >= 0) fetch<T, R>(p, source, fetched);
    for (int plane = p.z0 - rz; plane < p.z1 + rz; ++plane) {
        const int next = source_of(plane + 1);
        const int ry = Full ? R : opaque(radius[1]), last_z = Full ? 2 * R : 2 * opaque(rz);
        float filtered[S::columns] = {};
        if (source >= 0) {  // the same for the whole block
#pragma unroll
            for (int n = 0; n < S::of_thread; ++n) {
                const int i = threadIdx.x + n * kThreads;
                if ((n + 1) * kThreads > S::quads && i >= S::quads) continue;
                Quad<float> q;
#pragma unroll
                for (int j = 0; j < 4; ++j) q.v[j] = to_compute(fetched[n].v[j]);
                tile[i] = q;
            }
            __syncthreads();
        }
        if (next >= 0) fetch<T, R>(p, next, fetched);  // arrives while this plane is computed
        if (source >= 0) {
            for (int i = threadIdx.x; i < S::rows * kTileX / 4; i += kThreads) {
                const int row = i / (kTileX / 4), quad = i % (kTileX / 4), rx = Full ? R : opaque(radius[2]);
                if (!Full && (row < R - ry || row >= S::height + R + ry)) continue;  // never read
                float window[4 + 2 * R];
#pragma unroll
                for (int j = 0; j < 1 + R / 2; ++j) {
                    const Quad<float> q = tile[row * (S::pitch / 4) + quad + j];
#pragma unroll
                    for (int l = 0; l < 4; ++l) window[4 * j + l] = q.v[l];
                }
                const Quad<float>* of_x = taps[2] + opaque(0);
                Quad<float> sum = {};
#pragma unroll
                for (int k = 0; k < S::taps; ++k) {
                    if (!Full && (k < R - rx || k > R + rx)) continue;
                    const float tap = of_x[k / 4].v[k % 4];
#pragma unroll
                    for (int l = 0; l < 4; ++l) sum.v[l] = fmaf(tap, window[l + k], sum.v[l]);
                }
                lines[i] = sum;
            }
            __syncthreads();
            const float* line = &lines[0].v[0] + (first_row + R - ry) * kTileX + column;
#pragma unroll
            for (int j = 0; j < S::taps; ++j) {  // rows that the first column reads,
                if (!Full && j > 2 * ry) break;
                const float value = line[j * kTileX];
#pragma unroll
                for (int c = 0; c < S::columns && c <= j; ++c)
                    filtered[c] = fmaf(taps[1][(j - c) / 4].v[(j - c) % 4], value, filtered[c]);
            }
            const float* of_y = &taps[1][0].v[0] + 2 * ry;
            line += 2 * ry * kTileX;
#pragma unroll
            for (int j = 1; j < S::columns; ++j) {  // and those beyond, that only later ones read
                const float value = line[j * kTileX];
#pragma unroll
                for (int c = j; c < S::columns; ++c)
                    if (Full || ry > 0 || c == j) filtered[c] = fmaf(of_y[j - c], value, filtered[c]);
            }
        }
        // sums[s] belongs to output plane − rz + s, which reads this plane with tap rz − s; those from 2 · rz + 1 on
        // stay 0.
#pragma unroll
        for (int s = 0; s < S::taps; ++s) {
            if (!Full && s > last_z) break;
            const float tap = taps[0][s / 4].v[s % 4];
#pragma unroll
            for (int c = 0; c < S::columns; ++c) {
                const float before = s + 1 < S::taps ? sums[c][s + 1] : 0.f;
                sums[c][s] = fmaf(tap, filtered[c], before);
            }
        }
        if (plane - rz >= p.z0) {
#pragma unroll
            for (int c = 0; c < S::columns; ++c)
                if (c < p.out_rows) to[c * p.width] = to_storage<T>(sums[c][0]);
            to += p.plane;
        }
        source = next;
    }
}

// Runs where smallest < reach <= R, else returns at once: the host may not know the radius.
template <class T, int R>
__global__ void __launch_bounds__(kThreads, 2) march(const T* __restrict__ in, T* __restrict__ out, Volume v,
                                                     Taps<float> taps, Border border, int chunks, int smallest) {
    using S = Tile<R>;
    SHARED(Quad<float>, tile, [S::quads]);
    SHARED(Quad<float>, lines, [S::rows * kTileX / 4]);
    SHARED(Quad<float>, t, [3][S::tap_quads]);
    SHARED(int64_t, row_at, [S::rows]);
    SHARED(int, column_at, [S::pitch]);
    SHARED(int, radius, [3]);
    const int reach = taps.reach();
    if (reach <= smallest || reach > R) return;
    const int rz = taps.radius[0], ry = taps.radius[1], rx = taps.radius[2];

    const int64_t tiles_x = (v.size[2] + kTileX - 1) / kTileX, tiles_y = (v.size[1] + S::height - 1) / S::height;
    int64_t block = blockIdx.x;
    const int64_t x0 = block % tiles_x * kTileX;
    block /= tiles_x;
    const int64_t y0 = block % tiles_y * S::height;
    block /= tiles_y;
    // Chunks differ by one plane at most.
    const int64_t part = block % chunks, z0 = part * v.size[0] / chunks, z1 = (part + 1) * v.size[0] / chunks;
    const int64_t batch = block / chunks / v.channels, channel = block / chunks % v.channels;
    in += batch * v.in_stride[0] + channel * v.in_stride[1];
    out += batch * v.out_stride[0] + channel * v.out_stride[1];

    for (int i = threadIdx.x; i < 3 * S::taps; i += kThreads) {
        const int axis = i / S::taps, k = i % S::taps - R, r = taps.radius[axis];
        if (k < -r || k > r) continue;
        const int to = axis == 0 ? r - k : axis == 1 ? r + k : R + k;
        t[axis][to / 4].v[to % 4] = taps.of(axis)[k + r];
    }
    if (threadIdx.x < 3) radius[threadIdx.x] = taps.radius[threadIdx.x];
    for (int i = threadIdx.x; i < S::rows; i += kThreads) {
        const bool needed = i >= R - ry && i < S::height + R + ry;
        const int64_t y = needed ? border_source(y0 - R + i, v.size[1], border) : -1;
        row_at[i] = y < 0 ? -1 : y * v.size[2];
    }
    for (int i = threadIdx.x; i < S::pitch; i += kThreads)
        column_at[i] = static_cast<int>(border_source(x0 - R + i, v.size[2], border));
    __syncthreads();

    const int64_t x = x0 + threadIdx.x % kTileX, y = y0 + threadIdx.x / kTileX * S::columns;
    const int64_t out_rows = x < v.size[2] ? v.size[1] - y : 0;
    const Place<T, R> p{in,
                        out + (z0 * v.size[1] + y) * v.size[2] + x,
                        v.size[1] * v.size[2],
                        static_cast<int>(v.size[0]),
                        static_cast<int>(z0),
                        static_cast<int>(z1),
                        static_cast<int>(v.size[2]),
                        static_cast<int>(x0),
                        static_cast<int>(min(out_rows, int64_t{S::columns})),
                        reinterpret_cast<std::uintptr_t>(in) % sizeof(Quad<T>) == 0 && v.size[2] % 4 == 0,
                        row_at,
                        column_at};
    if (rz == R && ry == R && rx == R)
        march_planes<T, R, true>(p, radius, border, tile, lines, t);
    else
        march_planes<T, R, false>(p, radius, border, tile, lines, t);
}

// --- one axis a pass ---------------------------------------------------------------------------------------------
// An element is (outer, slow, fast): the fast index runs along memory; `slow` counts what is left of a channel's
// volume. The filtered axis is the fast one (x) or slow's last part.
struct Pass {
    int64_t channels, in_stride[2], out_stride[2];
    int64_t outer, slow, fast;
    int64_t size, step;  // of the axis: length, distance of neighbours
    int axis;
};

template <class In, class Out, class C>
__global__ void __launch_bounds__(256, 2) one_axis(const In* __restrict__ in, Out* __restrict__ out, Pass p,
                                                   Taps<C> taps, Border border, bool adjoint, int smallest) {
    if (taps.reach() <= smallest) return;
    const int r = taps.radius[p.axis], channels = static_cast<int>(p.channels), size = static_cast<int>(p.size);
    const C* t = taps.of(p.axis);
    for (int outer = blockIdx.z; outer < p.outer; outer += gridDim.z) {
        const int batch = outer / channels, channel = outer - batch * channels;
        for (int slow = blockIdx.y; slow < p.slow; slow += gridDim.y)
            for (int64_t fast = blockIdx.x * 256 + threadIdx.x; fast < p.fast; fast += 256 * gridDim.x) {
                const int64_t within = slow * p.fast + fast;
                const int64_t at = p.axis == 2 ? fast : slow % size;
                const In* line = in + batch * p.in_stride[0] + channel * p.in_stride[1] + within - at * p.step;
                C sum = 0;
                for (int k = -r; k <= r; ++k) {
                    const int64_t source = border_source(at + k, size, adjoint ? Border::constant : border);
                    if (source >= 0) sum = fma(t[k + r], static_cast<C>(to_compute(line[source * p.step])), sum);
                }
                if (adjoint && border != Border::constant) {
                    // What the positions beyond an end would have read goes to `at`.
                    for (int d = -r; d < r; ++d) {
                        const int64_t beyond = d < 0 ? d : size + d;
                        if (border_source(beyond, size, border) != at) continue;
                        C part = 0;  // summed apart: one long chain of roundings would lose digits
                        for (int k = -r; k <= r; ++k)
                            if (beyond + k >= 0 && beyond + k < size)
                                part = fma(t[k + r], static_cast<C>(to_compute(line[(beyond + k) * p.step])), part);
                        sum += part;
                    }
                }
                out[batch * p.out_stride[0] + channel * p.out_stride[1] + within] = to_storage<Out>(sum);
            }
    }
}

// --- launches ----------------------------------------------------------------------------------------------------
int64_t elements(const GpuCall& c) { return c.batch * c.channels * c.size[0] * c.size[1] * c.size[2]; }

bool folds(const GpuCall& c) { return c.adjoint && c.border != Border::constant; }

template <class T, int R>
void launch_march(const GpuCall& c, const Volume& v, const Taps<float>& taps, int smallest) {
    int processors = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, c.device));
    const int reach = c.device_sigma ? R : radius_of(c.host_sigma[0], c.truncated);
    MarchPlan plan = plan_march(c.batch * c.channels, c.size, reach, processors);
    if (c.chunks > 0) plan = {c.chunks, plan.blocks / plan.chunks * c.chunks};
    LAUNCH((march<T, R>), static_cast<unsigned>(plan.blocks), kThreads, 0, c.stream, static_cast<const T*>(c.in),
           static_cast<T*>(c.out), v, taps, c.border, static_cast<int>(plan.chunks), smallest);
}

template <class In, class Out, class C>
void launch_pass(const GpuCall& c, const void* in, void* out, const int64_t* in_stride, const int64_t* out_stride,
                 int axis, const Taps<C>& taps, int smallest) {
    const int64_t plane = c.size[1] * c.size[2];
    Pass p{c.channels,
           {in_stride[0], in_stride[1]},
           {out_stride[0], out_stride[1]},
           c.batch * c.channels,
           0,
           0,
           c.size[axis],
           0,
           axis};
    p.fast = axis == 0 ? plane : c.size[2];
    p.slow = axis == 0 ? c.size[0] : c.size[0] * c.size[1];
    p.step = axis == 0 ? plane : axis == 1 ? c.size[2] : 1;
    const auto at_most = [](int64_t n, int64_t limit) { return static_cast<unsigned>(n < limit ? n : limit); };
    const dim3 grid(at_most(ceil_div(p.fast, 256), 1024), at_most(p.slow, 4096), at_most(p.outer, 1024));
    LAUNCH((one_axis<In, Out, C>), grid, 256, 0, c.stream, static_cast<const In*>(in), static_cast<Out*>(out), p,
           taps, c.border, c.adjoint, smallest);
}

template <class T, class C>
void filter_as(const GpuCall& c) {
    if (elements(c) == 0) return;
    for (int64_t size : c.size) check_axis(size);
    const DeviceGuard guard(c.device);
    auto* work = static_cast<double*>(c.workspace);
    auto* radius = reinterpret_cast<int*>(work + 3 * (static_cast<int64_t>(c.max_radius) + 2));
    auto* values = reinterpret_cast<C*>(radius + 4);
    const HostSigma host{{c.host_sigma[0], c.host_sigma[1], c.host_sigma[2]}};
    LAUNCH(make_taps<C>, 3, 128, 0, c.stream, c.device_sigma, host, c.truncated, c.approx, c.normalize, c.max_radius,
           work, radius, values);
    const Taps<C> taps{radius, values, c.max_radius, c.derivative_axis};
    const bool known = c.device_sigma == nullptr;
    int smallest = -1;  // reach that the plain passes leave to the fused kernels
    if constexpr (sizeof(C) == 4) {
        if (!folds(c)) {
            const Volume v{c.channels,
                           {c.in_stride[0], c.in_stride[1]},
                           {c.out_stride[0], c.out_stride[1]},
                           {c.size[0], c.size[1], c.size[2]}};
            // A smaller halo for small radii, in fp32 only: each instance costs seconds of every build, and
            // half-sized elements have little to gain.
            int served = -1;
            if constexpr (std::is_same_v<T, float>) {
                if (!known || c.max_radius <= 4) launch_march<T, 4>(c, v, taps, -1);
                served = 4;
            }
            if (!known || (c.max_radius > served && c.max_radius <= kFusedReach))
                launch_march<T, 8>(c, v, taps, served);
            if (known && c.max_radius <= kFusedReach) return;
            smallest = kFusedReach;
        }
    }
    const int64_t volume = c.size[0] * c.size[1] * c.size[2];
    const int64_t dense[2] = {c.channels * volume, volume};
    launch_pass<T, C, C>(c, c.in, c.temporary[0], c.in_stride, dense, 2, taps, smallest);
    launch_pass<C, C, C>(c, c.temporary[0], c.temporary[1], dense, dense, 1, taps, smallest);
    launch_pass<C, T, C>(c, c.temporary[1], c.out, dense, c.out_stride, 0, taps, smallest);
}

template <class T>
void dot_as(const void* a, const void* b, int64_t n, double* partial, double* result, int device, void* stream) {
    const DeviceGuard guard(device);
    LAUNCH(dot_parts<T>, kDotBlocks, kDotThreads, 0, stream, static_cast<const T*>(a), static_cast<const T*>(b), n,
           partial);
    LAUNCH(dot_total, 1, kDotThreads, 0, stream, partial, result);
}

}  // namespace

std::size_t workspace_bytes(int max_radius) {
    const std::size_t m = static_cast<std::size_t>(max_radius);
    return sizeof(double) * (3 * (m + 2) + 2 + 6 * (2 * m + 1));
}

void filter_gpu(const GpuCall& c) {
    switch (c.storage) {
        case Storage::float32:
            return filter_as<float, float>(c);
        case Storage::float64:
            return filter_as<double, double>(c);
        case Storage::bfloat16:
            return filter_as<__nv_bfloat16, float>(c);
        case Storage::float16:
            return filter_as<__half, float>(c);
    }
}

void dot_gpu(const void* a, const void* b, int64_t n, Storage storage, double* partial, double* result, int device,
             void* stream) {
    switch (storage) {
        case Storage::float32:
            return dot_as<float>(a, b, n, partial, result, device, stream);
        case Storage::float64:
            return dot_as<double>(a, b, n, partial, result, device, stream);
        case Storage::bfloat16:
            return dot_as<__nv_bfloat16>(a, b, n, partial, result, device, stream);
        case Storage::float16:
            return dot_as<__half>(a, b, n, partial, result, device, stream);
    }
}

}  // namespace medaccel::gaussian
