// SPDX-License-Identifier: Apache-2.0
// The diffusion step on the CPU: one pass over memory.
//
// A job is a run of kJob elements of one sample; it goes through it in blocks of kBlock, whose normals lie in the
// first-level cache between being made and being used. Elements are independent, so neither jobs nor threads change
// a bit. A block whose elements are not the arithmetic's type, or that does not fill its last register, is staged
// through buffers that are padded to whole registers: there is one loop for all.
#include <algorithm>
#include <cstring>

#include "../common/parallel.h"
#include "half.h"
#include "noise.h"
#include "update.h"

namespace medaccel::diffusion_step {
namespace {

constexpr int64_t kJob = 1 << 15;
constexpr int kBlock = 512;
// Outputs that are together larger than this are written past the caches: reading them back from memory costs the
// caller less than reading each line before it is overwritten costs here.
constexpr int64_t kStreamedBytes = int64_t{1} << 23;

template <class T>
constexpr Storage kStorage = sizeof(T) == 4 ? Storage::float32 : Storage::float64;

constexpr int64_t element_bytes(Storage storage) {
    return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

template <class F>
void with_storage(Storage storage, const F& f) {
    switch (storage) {
        case Storage::float32:
            return f(float{});
        case Storage::float64:
            return f(double{});
        case Storage::bfloat16:
            return f(BFloat16{});
        case Storage::float16:
            return f(Float16{});
    }
}

template <class S, class T>
void convert(const S* from, int n, T* to) {
    for (int i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

template <class T>
struct Buffer {
    alignas(64) T value[kBlock];
};

template <class T>
class Block {
  public:
    static constexpr int width = Vec<T>::width;

    // Elements first … first + n-1 of one sample.
    Block(int64_t sample, int64_t first, int n) : sample_(sample), first_(first), n_(n) {
        whole_ = n % width == 0;
        padded_ = (n + width - 1) / width * width;
    }

    int count() const { return n_; }
    int padded() const { return padded_; }

    // Returns the input's elements as T, in whole registers; null without an input.
    const T* read(const Input& input, Buffer<T>& buffer) const {
        if (!input.data) return nullptr;
        const int64_t at = sample_ * input.stride + first_;
        if (whole_ && input.storage == kStorage<T>) return static_cast<const T*>(input.data) + at;
        with_storage(input.storage, [&](auto kind) {
            convert(static_cast<const decltype(kind)*>(input.data) + at, n_, buffer.value);
        });
        std::fill(buffer.value + n_, buffer.value + padded_, T(0));
        return buffer.value;
    }

    // Returns the place for the output's elements: the output itself, or the buffer, which `write` then empties.
    T* target(const Output& output, int64_t size, Buffer<T>& buffer) const {
        if (!output.data) return nullptr;
        const bool direct = whole_ && output.storage == kStorage<T>;
        return direct ? static_cast<T*>(output.data) + sample_ * size + first_ : buffer.value;
    }

    void write(const Output& output, int64_t size, const Buffer<T>& buffer) const {
        if (!output.data || (whole_ && output.storage == kStorage<T>)) return;
        with_storage(output.storage, [&](auto kind) {
            convert(buffer.value, n_, static_cast<decltype(kind)*>(output.data) + sample_ * size + first_);
        });
    }

    // Returns n bytes that are 0 for kept elements, or null if none is kept.
    const uint8_t* kept(const Input& mask) const {
        if (!mask.data) return nullptr;
        const uint8_t* bytes = static_cast<const uint8_t*>(mask.data) + sample_ * mask.stride + first_;
        return std::memchr(bytes, 0, n_) ? bytes : nullptr;
    }

    void fill_normals(const Noise& noise, uint64_t offset, Buffer<T>& z) const {
        const Stream stream{noise.seed, noise.sample_offset + static_cast<uint32_t>(sample_),
                            static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
        for (int i = 0; i < n_; i += kNormals<T>)
            normals_at<T>(stream, static_cast<uint64_t>(first_ + i) / 4, z.value + i);
    }

  private:
    int64_t sample_, first_;
    int n_, padded_;
    bool whole_;
};
static_assert(kBlock % kNormals<float> == 0 && kBlock % kNormals<double> == 0 && kJob % kBlock == 0);

template <class T>
Update<VectorLane<T>> update_of(const Problem& p, int64_t sample) {
    Update<VectorLane<T>> u;
    for (int i = 0; i < kCoefficients; ++i)
        u.value[i] = static_cast<T>(p.coefficient(static_cast<Coefficient>(i), sample));
    u.low = static_cast<T>(p.low);
    u.high = static_cast<T>(p.high);
    u.clip = p.clip;
    return u;
}

template <class T>
inline void put(Vec<T> value, T* to, bool stream) {
    if (stream)
        value.stream(to);
    else
        value.store(to);
}

template <class T>
struct ForwardBuffers {
    Buffer<T> x, m, p, z, guide, guide_z, next, x0;
};

template <class T>
void forward_block(const Block<T>& block, const Problem& problem, const Update<VectorLane<T>>& update,
                   const Forward& tensors, const Noise& noise, bool may_stream, ForwardBuffers<T>& buffers) {
    using L = VectorLane<T>;
    using V = Vec<T>;
    const T* x = block.read(tensors.sample, buffers.x);
    const T* m = block.read(tensors.model_output, buffers.m);
    const T* p = update.value[kF] == T(0) ? nullptr : block.read(tensors.previous, buffers.p);
    const T* z = nullptr;
    if (update.value[kS] != T(0)) {
        z = block.read(tensors.noise, buffers.z);
        if (!z) block.fill_normals(noise, noise.offset, buffers.z), z = buffers.z.value;
    }
    const uint8_t* mask = block.kept(tensors.mask);
    const T *guide = nullptr, *guide_z = nullptr;
    if (mask) {
        guide = block.read(tensors.guide, buffers.guide);
        if (update.value[kGuideStd] != T(0)) {
            block.fill_normals(noise, noise.offset | kGuideBit, buffers.guide_z);
            guide_z = buffers.guide_z.value;
        }
    }
    T* const next = block.target(tensors.next, problem.size, buffers.next);
    T* const x0 = block.target(tensors.x0, problem.size, buffers.x0);
    const bool stream = may_stream && !mask && simd::is_aligned(next) && (!x0 || simd::is_aligned(x0));
    for (int i = 0; i < block.padded(); i += V::width) {
        const auto vx = V::load(x + i).v, vm = m ? V::load(m + i).v : V::zero().v;
        const auto predicted = update.clipped(update.unclipped(vx, vm));
        auto y = update.next(vx, vm, predicted);
        if (p) y = L::fma(update.times(kF), V::load(p + i).v, y);
        if (z) y = L::fma(update.times(kS), V::load(z + i).v, y);
        if (mask) {  // before anything is written: an output may be an input
            auto held = update.times(kGuideScale) * V::load(guide + i).v;
            if (guide_z) held = L::fma(update.times(kGuideStd), V::load(guide_z + i).v, held);
            for (int lane = 0; lane < V::width && i + lane < block.count(); ++lane)
                if (!mask[i + lane]) y[lane] = held[lane];
        }
        if (x0) put(V{predicted}, x0 + i, stream);
        put(V{y}, next + i, stream);
    }
    if (stream) simd::finish_streams();
    block.write(tensors.next, problem.size, buffers.next);
    block.write(tensors.x0, problem.size, buffers.x0);
}

// Calls run(block, update) for every block; each thread has its own Buffers.
template <class T, class Buffers, class Run>
void for_each_block(const Problem& p, const Run& run) {
    check_size(p);
    if (p.size == 0) return;
    const int64_t jobs = ceil_div(p.size, kJob);
    parallel_for(
        p.batch * jobs, p.threads, [] { return Buffers(); },
        [&](int64_t job, Buffers& buffers) {
            const int64_t sample = job / jobs, begin = job % jobs * kJob, end = std::min(begin + kJob, p.size);
            const auto update = update_of<T>(p, sample);
            for (int64_t first = begin; first < end; first += kBlock) {
                const int n = static_cast<int>(std::min<int64_t>(kBlock, end - first));
                run(Block<T>(sample, first, n), update, buffers);
            }
        });
}

template <class T>
void forward_as(const Problem& p, const Forward& t, const Noise& noise) {
    const auto in_place = [&](const Output& o) {
        for (const Input* i : {&t.sample, &t.model_output, &t.previous, &t.noise, &t.guide})
            if (o.data && o.data == i->data) return true;
        return false;
    };
    const int64_t bytes =
        p.batch * p.size * (element_bytes(t.next.storage) + (t.x0.data ? element_bytes(t.x0.storage) : 0));
    const bool may_stream = bytes >= kStreamedBytes && !in_place(t.next) && !in_place(t.x0) &&
                            t.next.storage == kStorage<T> && (!t.x0.data || t.x0.storage == kStorage<T>);
    for_each_block<T, ForwardBuffers<T>>(p, [&](const Block<T>& block, const auto& update, auto& buffers) {
        forward_block<T>(block, p, update, t, noise, may_stream, buffers);
    });
}

template <class T>
struct BackwardBuffers {
    Buffer<T> grad, grad_x0, x, m, to_sample, to_model;
};

template <class T>
void backward_as(const Problem& p, const Backward& t) {
    using V = Vec<T>;
    for_each_block<T, BackwardBuffers<T>>(p, [&](const Block<T>& block, const auto& update, auto& buffers) {
        const T* grad = block.read(t.grad_next, buffers.grad);
        const T* grad_x0 = block.read(t.grad_x0, buffers.grad_x0);
        const T* x = block.read(t.sample, buffers.x);
        const T* m = block.read(t.model_output, buffers.m);
        if (const uint8_t* mask = grad ? block.kept(t.mask) : nullptr) {
            if (grad != buffers.grad.value) std::copy(grad, grad + block.padded(), buffers.grad.value);
            grad = buffers.grad.value;
            for (int i = 0; i < block.count(); ++i)
                if (!mask[i]) buffers.grad.value[i] = T(0);
        }
        T* const to_sample = block.target(t.grad_sample, p.size, buffers.to_sample);
        T* const to_model = block.target(t.grad_model_output, p.size, buffers.to_model);
        const auto at = [](const T* from, int i) { return from ? V::load(from + i).v : V::zero().v; };
        for (int i = 0; i < block.padded(); i += V::width) {
            const auto u = update.unclipped(at(x, i), at(m, i));
            typename V::Native sample_grad, model_grad;
            update.gradients(at(grad, i), at(grad_x0, i), u, sample_grad, model_grad);
            if (to_sample) V{sample_grad}.store(to_sample + i);
            if (to_model) V{model_grad}.store(to_model + i);
        }
        block.write(t.grad_sample, p.size, buffers.to_sample);
        block.write(t.grad_model_output, p.size, buffers.to_model);
    });
}

}  // namespace

void forward(const Problem& problem, const Forward& tensors, const Noise& noise) {
    if (tensors.sample.storage == Storage::float64)
        forward_as<double>(problem, tensors, noise);
    else
        forward_as<float>(problem, tensors, noise);
}

void backward(const Problem& problem, const Backward& tensors) {
    const Input& given = tensors.grad_next.data ? tensors.grad_next : tensors.grad_x0;
    if (given.storage == Storage::float64)
        backward_as<double>(problem, tensors);
    else
        backward_as<float>(problem, tensors);
}

}  // namespace medaccel::diffusion_step
