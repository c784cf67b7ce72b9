// SPDX-License-Identifier: Apache-2.0
// Instance norm's GPU kernels, for contiguous and channels-last tensors by the same code (blocks.h).
//
//   forward:   moments, merge_moments, normalise; or, where a block can do an instance, normalise_at_once
//   backward:  sums, merge_sums, gradient;        or gradient_at_once (and merge_sums for the parameters)
//
// Bytes: forward reads the input twice (once from memory and once from a cache where an instance is one block's), the
// residual once, and writes once. Backward reads gradient, input and signs, writes the residual's gradient; then
// reads the input and either that gradient or gradient and signs again, and writes the input's.
//
// Statistics are those of Chan, Golub and LeVeque, as on the CPU: of a few elements about their own mean, merged into
// a thread's, then a block's, then an instance's. Every order is fixed; there are no atomics.
#include "blocks.h"

namespace medaccel::instance_norm {
namespace {

// Vectors of a tensor that a thread reads before it uses the first. Wide ones have more constants to keep: with these
// numbers three blocks or more fit a multiprocessor, and 24 KiB or more are on their way to it.
constexpr int kMomentsBatch = 4;
template <int N>
constexpr int kForwardBatch = N == 8 ? 2 : 4;
template <int N>
constexpr int kBackwardBatch = N == 8 ? 1 : 2;
constexpr double kSmallSquare = 1e-30;  // squares of floats from here down lose digits

// Where a sign comes from; `none`: the gradient is that before the activation already.
enum class From : int { recompute, output, residual, none };

template <class S, class T>
struct Forward {
    const S *in, *residual;
    const T *weight, *bias;
    S* out;
    T *mean, *rstd;
    Partial* partial;  // [batch][channels][chunks]: mean, Σ (x − mean)²
    double eps;
    T slope;
};

template <class S, class T>
struct Backward {
    const S *grad, *in, *signs;
    int64_t grad_batch, grad_pitch;
    const T *weight, *bias, *mean, *rstd;
    S *grad_in, *grad_residual;
    T *grad_weight, *grad_bias;
    Partial* partial;  // [batch][channels][chunks]: Σ g, Σ g · (x − mean), g being the gradient before the activation
    Pair<T>* means;    // [batch][channels]: of g, of g · (x − mean) / σ²
    T slope;
    From from;
};

// --- statistics --------------------------------------------------------------------------------------------------
// One lane in double, one element at a time: squares of floats overflow from 1e19 on, and vanish below 1e-22.
template <class S>
__device__ Partial exact_moments(const S* in, int pitch, const Block& b) {
    double sum = 0, squares = 0;
    for (int i = b.row; i < b.items; i += b.rows) sum += static_cast<double>(to_compute(in[i * pitch]));
    const double mean = sum / b.items_of(b.row);
    for (int i = b.row; i < b.items; i += b.rows) {
        const double d = static_cast<double>(to_compute(in[i * pitch])) - mean;
        squares = fma(d, d, squares);
    }
    return {mean, squares};
}

template <class S, class T, int N, class Finish>
__device__ void block_moments(const S* in, const Plan& plan, const Block& b, double eps, const Finish& finish) {
    SHARED(Partial, entries, [kThreads * N]);
    in += b.plane * plan.voxels * (plan.last ? plan.channels : 1) + b.place;
    T mean[N] = {}, squares[N] = {};
    int count = 0;
    forwards<kMomentsBatch>(b, [&](int i) {
        Vector<S, N> x[kMomentsBatch];
        load(in, plan.pitch, b, i, x);
        const int more = min(kMomentsBatch, (b.end - i + b.rows - 1) / b.rows);
        count += more;
        const T inverse = T(1) / more, part = T(more) / count, weight = T(count - more) * part;
#pragma unroll
        for (int l = 0; l < N; ++l) {
            T sum = 0, square = 0;
#pragma unroll
            for (int u = 0; u < kMomentsBatch; ++u)
                if (u < more) sum += x[u][l];
            const T middle = sum * inverse;
#pragma unroll
            for (int u = 0; u < kMomentsBatch; ++u) {
                if (u >= more) continue;
                const T d = x[u][l] - middle;
                square = fma(d, d, square);
            }
            const T delta = middle - mean[l];
            mean[l] = fma(delta, part, mean[l]);
            squares[l] += fma(delta * weight, delta, square);
        }
    });
    if (!b.idle) {
        const double least = eps < kSmallSquare ? kSmallSquare * count : 0;
        unsigned inexact = 0;
#pragma unroll
        for (int l = 0; l < N; ++l) {
            entries[entry_of<N>(plan, b, l)] = {mean[l], squares[l]};
            if (!isfinite(squares[l]) || squares[l] < least) inexact |= 1u << l;
        }
        if constexpr (sizeof(T) == 4) {
#pragma unroll 1
            for (int l = 0; inexact != 0; ++l, inexact >>= 1)
                if (inexact & 1u) entries[entry_of<N>(plan, b, l)] = exact_moments(in + l, plan.pitch, b);
        }
    }
    __syncthreads();
    const auto combine = [&](const Entries& e, int lane, int group) {
        return merged(
            e.count, lane, group, [&](int i) { return b.items_of(plan.last ? i : i / N); },
            [&](int i) { return entries[e.first + i * e.stride]; });
    };
    each_channel<N>(plan, b, combine, finish);
}

template <class T>
__device__ inline void put_moments(const Partial& moments, int64_t voxels, double eps, T* mean, T* rstd) {
    *mean = static_cast<T>(moments.a);
    *rstd = static_cast<T>(1 / sqrt(moments.b / static_cast<double>(voxels) + eps));
}

template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads, 3) moments(Forward<S, T> t, Plan plan) {
    const Block b = Block::of<N>(plan);
    block_moments<S, T, N>(t.in, plan, b, t.eps, [&](int64_t lane, const Partial& moments) {
        const int64_t instance = plan.last ? b.plane * plan.channels + lane : b.plane;
        t.partial[instance * plan.chunks + b.chunk] = moments;
    });
}

// A warp an instance.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_moments(const Partial* partial, Plan plan, int64_t instances, double eps, T* mean, T* rstd) {
    const int64_t instance = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (instance >= instances) return;  // whole warps
    const Partial whole = merged(
        static_cast<int>(plan.chunks), lane, 32, [&](int i) { return min(plan.step, plan.voxels - i * plan.step); },
        [&](int i) { return partial[instance * plan.chunks + i]; });
    if (lane == 0) put_moments(whole, plan.voxels, eps, mean + instance, rstd + instance);
}

// --- forward -----------------------------------------------------------------------------------------------------
// y = (x − mean) · scale + shift, for each lane of a thread.
template <class T, int N>
struct Affine {
    T mean[N], scale[N], shift[N];

    __device__ Affine(const Plan& plan, const Block& b, const T* means, const T* rstd, const T* weight,
                      const T* bias) {
#pragma unroll
        for (int l = 0; l < N; ++l) {
            mean[l] = scale[l] = shift[l] = T(0);
            if (b.idle) continue;
            const int64_t instance = b.instance<N>(plan, l), channel = b.channel<N>(plan, l);
            mean[l] = means[instance];
            scale[l] = weight ? rstd[instance] * weight[channel] : rstd[instance];
            shift[l] = bias ? bias[channel] : T(0);
        }
    }
};

template <class S, class T, int N>
__device__ void block_normalise(const Forward<S, T>& t, const Plan& plan, const Block& b) {
    const Affine<T, N> affine(plan, b, t.mean, t.rstd, t.weight, t.bias);
    const int64_t start = b.plane * plan.voxels * (plan.last ? plan.channels : 1) + b.place;
    backwards<kForwardBatch<N>>(b, [&](int i) {
        Vector<S, N> x[kForwardBatch<N>], extra[kForwardBatch<N>];
        load(t.in + start, plan.pitch, b, i, x);
        if (t.residual) load(t.residual + start, plan.pitch, b, i, extra);
#pragma unroll
        for (int u = 0; u < kForwardBatch<N>; ++u) {
            const int item = i + u * b.rows;
            if (!b.has(item)) continue;
            Vector<S, N> result;
#pragma unroll
            for (int l = 0; l < N; ++l) {
                T y = fma(x[u][l] - affine.mean[l], affine.scale[l], affine.shift[l]);
                if (t.residual) y += extra[u][l];
                result.set(l, y > T(0) ? y : y * t.slope);
            }
            result.store(t.out + start + item * plan.pitch);
        }
    });
}

template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads, 3) normalise(Forward<S, T> t, Plan plan) {
    block_normalise<S, T, N>(t, plan, Block::of<N>(plan));
}

template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads, 3) normalise_at_once(Forward<S, T> t, Plan plan) {
    const Block b = Block::of<N>(plan);
    block_moments<S, T, N>(t.in, plan, b, t.eps, [&](int64_t lane, const Partial& moments) {
        const int64_t instance = plan.last ? b.plane * plan.channels + lane : b.plane;
        put_moments(moments, plan.voxels, t.eps, t.mean + instance, t.rstd + instance);
    });
    __syncthreads();  // the block reads what it has just written
    block_normalise<S, T, N>(t, plan, b);
}

// --- backward ----------------------------------------------------------------------------------------------------
// visit(item, lane, x − mean, gradient before the activation) for a thread's elements, then done(item).
template <class S, class T, int N>
struct Elements {
    Vector<S, N> grad[kBackwardBatch<N>], in[kBackwardBatch<N>], signs[kBackwardBatch<N>];
    int64_t start, grad_start;

    __device__ Elements(const Backward<S, T>& t, const Plan& plan, const Block& b) {
        start = b.plane * plan.voxels * (plan.last ? plan.channels : 1) + b.place;
        grad_start = plan.last
                         ? b.plane * t.grad_batch + b.begin * t.grad_pitch + b.column * N
                         : b.plane / plan.channels * t.grad_batch + b.plane % plan.channels * t.grad_pitch + b.begin;
    }
    __device__ void load_batch(const Backward<S, T>& t, const Plan& plan, const Block& b, int i) {
        load(t.grad + grad_start, plan.last ? static_cast<int>(t.grad_pitch) : N, b, i, grad);
        load(t.in + start, plan.pitch, b, i, in);
        if (t.signs) load(t.signs + start, plan.pitch, b, i, signs);
    }
    __device__ T deviation(const Affine<T, N>& affine, int u, int l) const { return in[u][l] - affine.mean[l]; }
    // The gradient before the activation.
    __device__ T before(const Backward<S, T>& t, const Affine<T, N>& affine, int u, int l, T d) const {
        const T g = grad[u][l];
        if (t.from == From::none) return g;
        T y = 0;
        if (t.from != From::output) y = fma(d, affine.scale[l], affine.shift[l]);
        if (t.from != From::recompute) y += signs[u][l];
        return y > T(0) ? g : g * t.slope;
    }
};

template <class S, class T, int N, class Finish>
__device__ void block_sums(const Backward<S, T>& t, const Plan& plan, const Block& b, const Finish& finish) {
    SHARED(Pair<T>, entries, [kThreads * N]);
    const Affine<T, N> affine(plan, b, t.mean, t.rstd, t.weight, t.bias);
    Elements<S, T, N> e(t, plan, b);
    T sum[N] = {}, product[N] = {};
    forwards<kBackwardBatch<N>>(b, [&](int i) {
        e.load_batch(t, plan, b, i);
#pragma unroll
        for (int u = 0; u < kBackwardBatch<N>; ++u) {
            const int item = i + u * b.rows;
            if (!b.has(item)) continue;
            Vector<S, N> kept;
#pragma unroll
            for (int l = 0; l < N; ++l) {
                const T d = e.deviation(affine, u, l), g = e.before(t, affine, u, l, d);
                sum[l] += g;
                product[l] = fma(g, d, product[l]);
                kept.set(l, g);
            }
            if (t.grad_residual) kept.store(t.grad_residual + e.start + item * plan.pitch);
        }
    });
    if (!b.idle)
#pragma unroll
        for (int l = 0; l < N; ++l) entries[entry_of<N>(plan, b, l)] = {sum[l], product[l]};
    __syncthreads();
    const auto combine = [&](const Entries& of, int lane, int group) {
        return added(of.count, lane, group, [&](int i) {
            const Pair<T> entry = entries[of.first + i * of.stride];
            return Partial{entry.a, entry.b};
        });
    };
    each_channel<N>(plan, b, combine, finish);
}

template <class T>
__device__ inline Pair<T> means_of(const Partial& sums, T rstd, int64_t voxels) {
    const double r = rstd, n = static_cast<double>(voxels);
    return {static_cast<T>(sums.a / n), static_cast<T>(sums.b * r * r / n)};
}

template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads, 3) sums(Backward<S, T> t, Plan plan) {
    const Block b = Block::of<N>(plan);
    block_sums<S, T, N>(t, plan, b, [&](int64_t lane, const Partial& sums) {
        const int64_t instance = plan.last ? b.plane * plan.channels + lane : b.plane;
        t.partial[instance * plan.chunks + b.chunk] = sums;
    });
}

// A warp a channel, of all samples, whose order is that of the batch.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_sums(const Partial* partial, Plan plan, int64_t batch,
                                                       const T* rstd, Pair<T>* means, T* grad_weight, T* grad_bias) {
    const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (channel >= plan.channels) return;  // whole warps
    Partial of_channel{0, 0};
    for (int64_t sample = 0; sample < batch; ++sample) {
        const int64_t instance = sample * plan.channels + channel;
        const Partial whole = added(static_cast<int>(plan.chunks), lane, 32,
                                    [&](int i) { return partial[instance * plan.chunks + i]; });
        of_channel.a += whole.a;
        of_channel.b += whole.b * static_cast<double>(rstd[instance]);
        if (lane == 0) means[instance] = means_of(whole, rstd[instance], plan.voxels);
    }
    if (lane != 0 || !grad_weight) return;
    grad_weight[channel] = static_cast<T>(of_channel.b);
    grad_bias[channel] = static_cast<T>(of_channel.a);
}

template <class S, class T, int N>
__device__ void block_gradient(const Backward<S, T>& t, const Plan& plan, const Block& b) {
    const Affine<T, N> affine(plan, b, t.mean, t.rstd, t.weight, t.bias);
    T mean_g[N], mean_gx[N];
#pragma unroll
    for (int l = 0; l < N; ++l) {
        mean_g[l] = mean_gx[l] = T(0);
        if (b.idle) continue;
        const Pair<T> means = t.means[b.instance<N>(plan, l)];
        mean_g[l] = means.a;
        mean_gx[l] = means.b;
    }
    Elements<S, T, N> e(t, plan, b);
    backwards<kBackwardBatch<N>>(b, [&](int i) {
        e.load_batch(t, plan, b, i);
#pragma unroll
        for (int u = 0; u < kBackwardBatch<N>; ++u) {
            const int item = i + u * b.rows;
            if (!b.has(item)) continue;
            Vector<S, N> result;
#pragma unroll
            for (int l = 0; l < N; ++l) {
                const T d = e.deviation(affine, u, l), g = e.before(t, affine, u, l, d);
                result.set(l, affine.scale[l] * fma(-d, mean_gx[l], g - mean_g[l]));
            }
            result.store(t.grad_in + e.start + item * plan.pitch);
        }
    });
}

// The gradient before the activation, where the sums' pass has written it: one read instead of two.
template <class S, class T>
__device__ inline void take_written_gradient(Backward<S, T>& t, const Plan& plan) {
    if (!t.grad_residual) return;
    t.grad = t.grad_residual;
    t.grad_batch = plan.voxels * plan.channels;
    t.grad_pitch = plan.last ? plan.channels : plan.voxels;
    t.signs = nullptr;
    t.from = From::none;
}

template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads, 3) gradient(Backward<S, T> t, Plan plan) {
    take_written_gradient(t, plan);
    block_gradient<S, T, N>(t, plan, Block::of<N>(plan));
}

template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads, 2) gradient_at_once(Backward<S, T> t, Plan plan) {
    const Block b = Block::of<N>(plan);
    block_sums<S, T, N>(t, plan, b, [&](int64_t lane, const Partial& sums) {
        const int64_t instance = plan.last ? b.plane * plan.channels + lane : b.plane;
        t.means[instance] = means_of(sums, t.rstd[instance], plan.voxels);
        if (t.grad_weight) t.partial[instance] = sums;
    });
    __syncthreads();  // the block reads what it has just written
    take_written_gradient(t, plan);
    block_gradient<S, T, N>(t, plan, b);
}

// --- launches ----------------------------------------------------------------------------------------------------
int64_t instances_of(const GpuProblem& g) { return g.problem.batch * g.problem.channels; }
unsigned warps_of(int64_t count) { return static_cast<unsigned>(ceil_div(count, kThreads / 32)); }
bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0; }

// f(S, T, N): types of storage and arithmetic, elements of a vector; of one element where 16 bytes are not aligned.
template <class F>
void with_types(const GpuProblem& g, bool aligned, const F& f) {
    const int64_t line = g.problem.channels_last ? g.problem.channels : g.problem.voxels;
    const auto call = [&](auto storage, auto arithmetic, auto width) {
        if (aligned && line % width == 0)
            f(storage, arithmetic, width);
        else
            f(storage, arithmetic, std::integral_constant<int, 1>());
    };
    switch (g.storage) {
        case Storage::float32:
            return call(float(), float(), std::integral_constant<int, 4>());
        case Storage::float64:
            return call(double(), double(), std::integral_constant<int, 1>());
        case Storage::bfloat16:
            return call(__nv_bfloat16(), float(), std::integral_constant<int, 8>());
        case Storage::float16:
            return call(__half(), float(), std::integral_constant<int, 8>());
    }
}

template <class S, class T, int N>
void launch_forward(const GpuProblem& g, const Forward<S, T>& t) {
    const Plan plan = plan_of(g, N);
    check_offsets(plan, plan.channels);
    const DeviceGuard guard(g.device);
    if (in_one_launch(g)) {
        LAUNCH((normalise_at_once<S, T, N>), blocks_of(plan), kThreads, 0, g.stream, t, plan);
        return;
    }
    LAUNCH((moments<S, T, N>), blocks_of(plan), kThreads, 0, g.stream, t, plan);
    LAUNCH(merge_moments<T>, warps_of(instances_of(g)), kThreads, 0, g.stream, t.partial, plan, instances_of(g),
           t.eps, t.mean, t.rstd);
    LAUNCH((normalise<S, T, N>), blocks_of(plan), kThreads, 0, g.stream, t, plan);
}

template <class S, class T, int N>
void launch_backward(const GpuProblem& g, const Backward<S, T>& t) {
    const Plan plan = plan_of(g, N);
    check_offsets(plan, std::max(plan.channels, t.grad_pitch));
    const DeviceGuard guard(g.device);
    const bool at_once = in_one_launch(g);
    if (at_once)
        LAUNCH((gradient_at_once<S, T, N>), blocks_of(plan), kThreads, 0, g.stream, t, plan);
    else
        LAUNCH((sums<S, T, N>), blocks_of(plan), kThreads, 0, g.stream, t, plan);
    if (!at_once || t.grad_weight)
        LAUNCH(merge_sums<T>, warps_of(plan.channels), kThreads, 0, g.stream, t.partial, plan, g.problem.batch,
               t.rstd, t.means, t.grad_weight, t.grad_bias);
    if (!at_once) LAUNCH((gradient<S, T, N>), blocks_of(plan), kThreads, 0, g.stream, t, plan);
}

bool is_empty(const Problem& p) { return p.batch * p.channels * p.voxels == 0; }

}  // namespace

bool in_one_launch(const GpuProblem& g) {
    const int64_t size = bytes_of(g.storage);
    const int64_t line = g.problem.channels_last ? std::min(kGroupBytes, g.problem.channels * size) : size;
    return g.problem.voxels * line <= kOneLaunch;
}

std::size_t forward_bytes(const GpuProblem& g) {
    if (in_one_launch(g) || is_empty(g.problem)) return 0;
    return sizeof(Partial) * instances_of(g) * plan_of(g, 1).chunks;
}

std::size_t backward_bytes(const GpuProblem& g) {
    if (is_empty(g.problem)) return 0;
    return sizeof(Partial) * instances_of(g) * (plan_of(g, 1).chunks + 1);  // `means` take no more than one each
}

void forward_gpu(const GpuProblem& g, const void* in, const void* weight, const void* bias, const void* residual,
                 void* out, void* mean, void* rstd, void* work) {
    if (is_empty(g.problem)) return;
    const bool aligned = is_aligned(in) && is_aligned(residual) && is_aligned(out);
    with_types(g, aligned, [&](auto storage, auto arithmetic, auto width) {
        using S = decltype(storage);
        using T = decltype(arithmetic);
        const T slope = static_cast<T>(g.problem.activate ? g.problem.negative_slope : 1);
        launch_forward<S, T, decltype(width)::value>(
            g, {static_cast<const S*>(in), static_cast<const S*>(residual), static_cast<const T*>(weight),
                static_cast<const T*>(bias), static_cast<S*>(out), static_cast<T*>(mean), static_cast<T*>(rstd),
                static_cast<Partial*>(work), g.problem.eps, slope});
    });
}

void backward_gpu(const GpuProblem& g, const Gradient& grad, const void* in, const void* weight, const void* bias,
                  const void* signs, Sign sign, const void* mean, const void* rstd, void* grad_in, void* grad_weight,
                  void* grad_bias, void* grad_residual, void* work) {
    if (is_empty(g.problem)) return;
    const int64_t per_vector = kVectorBytes / bytes_of(g.storage);
    const bool aligned = is_aligned(grad.data) && grad.batch_stride % per_vector == 0 &&
                         grad.pitch % per_vector == 0 && is_aligned(in) && is_aligned(signs) && is_aligned(grad_in) &&
                         is_aligned(grad_residual);
    auto* const partial = static_cast<Partial*>(work);
    From from = sign == Sign::recompute ? From::recompute : sign == Sign::from_output ? From::output : From::residual;
    if (!g.problem.activate) from = From::none;
    with_types(g, aligned, [&](auto storage, auto arithmetic, auto width) {
        using S = decltype(storage);
        using T = decltype(arithmetic);
        const T slope = static_cast<T>(g.problem.activate ? g.problem.negative_slope : 1);
        launch_backward<S, T, decltype(width)::value>(
            g, {static_cast<const S*>(grad.data), static_cast<const S*>(in),
                from == From::none || from == From::recompute ? nullptr : static_cast<const S*>(signs),
                grad.batch_stride, grad.pitch, static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<const T*>(mean), static_cast<const T*>(rstd), static_cast<S*>(grad_in),
                static_cast<S*>(grad_residual), static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), partial,
                reinterpret_cast<Pair<T>*>(partial + instances_of(g) * plan_of(g, 1).chunks), slope, from});
    });
}

}  // namespace medaccel::instance_norm
