// SPDX-License-Identifier: Apache-2.0
// The diffusion step's GPU kernels: a thread has four neighbouring elements of a sample, which share one call of
// Philox and move in one instruction where their addresses allow. The update is bound by memory: 16 bytes an element
// in fp32, against about 45 instructions for the normal and the update.
//
// Each tensor keeps its own type (a bfloat16 network's output beside a float sample): it is looked up at each
// access, the same way for all threads.
#include "../common/cuda_portable.h"
#include "../common/cuda_storage.h"
#include "../common/philox.h"
#include "cuda.h"
#include "normal.h"
#include "update.h"

namespace medaccel::diffusion_step {
namespace {

constexpr int kThreads = 256;

// The arguments that both kernels take by value.
struct Arguments {
    int64_t batch, size, groups;  // groups of four elements in a sample
    const double* coefficients;   // as in GpuProblem
    int64_t columns;
    double shared[kCoefficients];
    bool clip;
    double low, high;
};

// Elements i … i + 3 of one sample, of which `count` exist.
struct Place {
    int64_t sample, i;
    int count;
};

template <class T, class S>
__device__ inline void load_as(const Input& input, const Place& at, T (&to)[4]) {
    const S* from = static_cast<const S*>(input.data) + at.sample * input.stride + at.i;
    if (at.count == 4 && reinterpret_cast<std::uintptr_t>(from) % sizeof(Quad<S>) == 0) {
        const Quad<S> quad = *reinterpret_cast<const Quad<S>*>(from);
        for (int j = 0; j < 4; ++j) to[j] = static_cast<T>(to_compute(quad.v[j]));
        return;
    }
    for (int j = 0; j < 4; ++j) to[j] = j < at.count ? static_cast<T>(to_compute(from[j])) : T(0);
}

// Returns zeros without an input.
template <class T>
__device__ inline void load(const Input& input, const Place& at, T (&to)[4]) {
    if (!input.data) {
        for (int j = 0; j < 4; ++j) to[j] = T(0);
        return;
    }
    switch (input.storage) {
        case Storage::float32:
            return load_as<T, float>(input, at, to);
        case Storage::float64:
            return load_as<T, double>(input, at, to);
        case Storage::bfloat16:
            return load_as<T, __nv_bfloat16>(input, at, to);
        case Storage::float16:
            return load_as<T, __half>(input, at, to);
    }
}

template <class T, class S>
__device__ inline void store_as(const Output& output, int64_t size, const Place& at, const T (&from)[4]) {
    S* to = static_cast<S*>(output.data) + at.sample * size + at.i;
    if (at.count == 4 && reinterpret_cast<std::uintptr_t>(to) % sizeof(Quad<S>) == 0) {
        Quad<S> quad;
        for (int j = 0; j < 4; ++j) quad.v[j] = to_storage<S>(from[j]);
        *reinterpret_cast<Quad<S>*>(to) = quad;
        return;
    }
    for (int j = 0; j < at.count; ++j) to[j] = to_storage<S>(from[j]);
}

template <class T>
__device__ inline void store(const Output& output, int64_t size, const Place& at, const T (&from)[4]) {
    if (!output.data) return;
    switch (output.storage) {
        case Storage::float32:
            return store_as<T, float>(output, size, at, from);
        case Storage::float64:
            return store_as<T, double>(output, size, at, from);
        case Storage::bfloat16:
            return store_as<T, __nv_bfloat16>(output, size, at, from);
        case Storage::float16:
            return store_as<T, __half>(output, size, at, from);
    }
}

// Bit j: element j is generated, not kept.
__device__ inline unsigned generated(const Input& mask, const Place& at) {
    if (!mask.data) return 0xFu;
    const auto* bytes = static_cast<const unsigned char*>(mask.data) + at.sample * mask.stride + at.i;
    unsigned bits = 0;
    for (int j = 0; j < at.count; ++j) bits |= unsigned{bytes[j] != 0} << j;
    return bits;
}

template <class T>
__device__ inline Update<ScalarLane<T>> update_of(const Arguments& a, int64_t sample) {
    Update<ScalarLane<T>> update;
    for (int i = 0; i < kCoefficients; ++i)
        update.value[i] = static_cast<T>(
            a.coefficients ? a.coefficients[i * a.columns + (a.columns == 1 ? 0 : sample)] : a.shared[i]);
    update.low = static_cast<T>(a.low);
    update.high = static_cast<T>(a.high);
    update.clip = a.clip;
    return update;
}

template <class T>
__device__ inline void make_normals(const Noise& noise, uint64_t offset, const Place& at, T (&z)[4]) {
    using L = ScalarLane<T>;
    const auto words = philox::random_words(noise.seed, static_cast<uint32_t>(at.i / 4),
                                            noise.sample_offset + static_cast<uint32_t>(at.sample),
                                            static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32));
    normal_pair<L>(words.w[0], words.w[1], z[0], z[1]);
    normal_pair<L>(words.w[2], words.w[3], z[2], z[3]);
}

// Calls visit(place, update) for the threads' share of all groups.
template <class T, class Visit>
__device__ inline void for_each_group(const Arguments& a, const Visit& visit) {
    for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
        const auto update = update_of<T>(a, sample);
        const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
        for (int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; group < a.groups;
             group += step) {
            const int64_t left = a.size - 4 * group;
            visit(Place{sample, 4 * group, left < 4 ? static_cast<int>(left) : 4}, update);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Arguments arguments, Forward t, Noise host_noise, const int64_t* device_noise) {
    using L = ScalarLane<T>;
    Noise noise = host_noise;
    if (device_noise)
        noise = {static_cast<uint64_t>(device_noise[0]), static_cast<uint64_t>(device_noise[1]),
                 static_cast<uint32_t>(device_noise[2])};
    for_each_group<T>(arguments, [&](const Place& at, const Update<L>& update) {
        T x[4], m[4], x0[4], next[4], extra[4];
        load(t.sample, at, x);
        load(t.model_output, at, m);
        for (int j = 0; j < 4; ++j) {
            x0[j] = update.clipped(update.unclipped(x[j], m[j]));
            next[j] = update.next(x[j], m[j], x0[j]);
        }
        const auto add = [&](Coefficient i) {
            for (int j = 0; j < 4; ++j) next[j] = L::fma(update.value[i], extra[j], next[j]);
        };
        if (t.previous.data && update.value[kF] != T(0)) {
            load(t.previous, at, extra);
            add(kF);
        }
        if (update.value[kS] != T(0)) {
            if (t.noise.data)
                load(t.noise, at, extra);
            else
                make_normals(noise, noise.offset, at, extra);
            add(kS);
        }
        const unsigned made = generated(t.mask, at);
        if (t.mask.data && made != 0xFu) {
            T held[4];
            load(t.guide, at, held);
            for (int j = 0; j < 4; ++j) held[j] *= update.value[kGuideScale];
            if (update.value[kGuideStd] != T(0)) {
                make_normals(noise, noise.offset | kGuideBit, at, extra);
                for (int j = 0; j < 4; ++j) held[j] = L::fma(update.value[kGuideStd], extra[j], held[j]);
            }
            for (int j = 0; j < 4; ++j)
                if (!(made >> j & 1u)) next[j] = held[j];
        }
        store(t.next, arguments.size, at, next);
        store(t.x0, arguments.size, at, x0);
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(Arguments arguments, Backward t) {
    for_each_group<T>(arguments, [&](const Place& at, const Update<ScalarLane<T>>& update) {
        T grad[4], grad_x0[4], x[4], m[4];
        load(t.grad_next, at, grad);
        load(t.grad_x0, at, grad_x0);
        load(t.sample, at, x);
        load(t.model_output, at, m);
        const unsigned made = generated(t.mask, at);
        for (int j = 0; j < 4; ++j) {
            const T u = update.unclipped(x[j], m[j]), g = made >> j & 1u ? grad[j] : T(0);
            update.gradients(g, grad_x0[j], u, x[j], m[j]);
        }
        store(t.grad_sample, arguments.size, at, x);
        store(t.grad_model_output, arguments.size, at, m);
    });
}

Arguments arguments_of(const GpuProblem& g) {
    const Problem& p = g.problem;
    check_size(p);
    Arguments a{p.batch, p.size, ceil_div(p.size, 4), p.coefficients, p.columns, {}, p.clip, p.low, p.high};
    for (int i = 0; i < kCoefficients; ++i) a.shared[i] = g.shared[i];
    return a;
}

// Enough blocks to fill any GPU several times over; threads that have more to do go round.
dim3 grid_of(const Arguments& a) {
    const auto at_most = [](int64_t n, int64_t limit) { return static_cast<unsigned>(n < limit ? n : limit); };
    return dim3(at_most(ceil_div(a.groups, kThreads), 1 << 16), at_most(a.batch, 1 << 15));
}

template <class T>
void forward_as(const GpuProblem& problem, const Forward& tensors, const Noise& noise, const int64_t* device_noise) {
    const Arguments a = arguments_of(problem);
    if (a.batch == 0 || a.size == 0) return;
    const DeviceGuard guard(problem.device);
    LAUNCH(forward_kernel<T>, grid_of(a), kThreads, 0, problem.stream, a, tensors, noise, device_noise);
}

template <class T>
void backward_as(const GpuProblem& problem, const Backward& tensors) {
    const Arguments a = arguments_of(problem);
    if (a.batch == 0 || a.size == 0) return;
    const DeviceGuard guard(problem.device);
    LAUNCH(backward_kernel<T>, grid_of(a), kThreads, 0, problem.stream, a, tensors);
}

}  // namespace

void forward_gpu(const GpuProblem& problem, const Forward& tensors, const Noise& noise, const int64_t* device_noise) {
    if (tensors.sample.storage == Storage::float64)
        forward_as<double>(problem, tensors, noise, device_noise);
    else
        forward_as<float>(problem, tensors, noise, device_noise);
}

void backward_gpu(const GpuProblem& problem, const Backward& tensors) {
    const Input& given = tensors.grad_next.data ? tensors.grad_next : tensors.grad_x0;
    if (given.storage == Storage::float64)
        backward_as<double>(problem, tensors);
    else
        backward_as<float>(problem, tensors);
}

}  // namespace medaccel::diffusion_step
