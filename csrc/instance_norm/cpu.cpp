// SPDX-License-Identifier: Apache-2.0
// Instance normalisation on the CPU, for both memory layouts by the same loops.
//
// Memory is cut into chunks that stay in the first-level cache, and a chunk into rows of `lanes` elements, whole
// registers: channels last, a row holds every channel of one voxel or of several; channel by channel, all lanes are
// one channel. So each lane sums on its own, in a fixed order.
//
// Statistics are those of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979 (a parallel Welford): a chunk's mean, its squares about that mean, then chunks merged in double in
// the order in which they lie. Bits do not depend on the number of threads.
#include "instance_norm.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../common/parallel.h"
#include "../common/simd.h"

namespace medaccel::instance_norm {
namespace {

constexpr int64_t kChunk = 4096;                 // elements: 16 KiB of floats
constexpr int64_t kLanes = 32;                   // at least so many
constexpr int64_t kStreamed = int64_t(1) << 25;  // bytes: an output beyond the caches is written past them

constexpr double kSmallSquare = 1e-30;  // squares of floats from here down lose digits

// One chunk: `rows` rows of `lanes` elements from `begin`, then `tail` elements.
struct Chunk {
    int64_t begin, rows, lanes, tail;
};

template <class T>
class Layout {
  public:
    explicit Layout(const Problem& p) : channels_(p.channels_last ? p.channels : 1) {
        const int64_t planes = p.channels_last ? p.batch : p.batch * p.channels;
        size_ = p.voxels * channels_;
        // Whole voxels in whole registers, so that a lane has the same channel in every row and chunk.
        lanes_ = std::lcm<int64_t>(channels_, simd::Vec<T>::width);
        lanes_ *= (kLanes + lanes_ - 1) / lanes_;
        step_ = std::max<int64_t>(1, kChunk / lanes_) * lanes_;
        per_plane_ = (size_ + step_ - 1) / step_;
        count_ = planes * per_plane_;
        for (int64_t l = 0; l < lanes_; ++l) channel_.push_back(l % channels_);
    }
    int64_t count() const { return count_; }
    int64_t per_plane() const { return per_plane_; }
    int64_t lanes() const { return lanes_; }
    int64_t plane_of(int64_t chunk) const { return chunk / per_plane_; }
    Chunk operator[](int64_t chunk) const {
        const int64_t within = chunk % per_plane_ * step_;
        const int64_t n = std::min(step_, size_ - within);
        return {plane_of(chunk) * size_ + within, n / lanes_, lanes_, n % lanes_};
    }
    // The channel of a lane, among the plane's.
    int64_t channel_of(int64_t lane) const { return channel_[lane]; }
    int64_t plane_channels() const { return channels_; }
    // Returns the place of a plane's first channel in [batch][channels].
    int64_t first_channel(int64_t plane) const { return plane * channels_; }

  private:
    int64_t channels_, size_, lanes_, step_, per_plane_, count_;
    std::vector<int64_t> channel_;
};

// A register of one element, for elements that do not fill a row.
template <class T>
struct One {
    static constexpr int width = 1;
    T v;
    static One all(T x) { return {x}; }
    static One load(const T* p) { return {*p}; }
    void store(T* p) const { *p = v; }
    void stream(T* p) const { *p = v; }
    One operator+(One o) const { return {v + o.v}; }
    One operator-(One o) const { return {v - o.v}; }
    One operator*(One o) const { return {v * o.v}; }
};
template <class T>
inline One<T> fma(One<T> a, One<T> b, One<T> c) {
    return {simd::fma(a.v, b.v, c.v)};
}
using simd::fma;

// Calls f(V(), where in memory, lane) for every register V of a chunk in the order of memory.
template <class T, class F>
inline void each(const Chunk& c, const F& f) {
    using V = simd::Vec<T>;
    int64_t at = c.begin;
    for (int64_t r = 0; r < c.rows; ++r)
        for (int64_t l = 0; l < c.lanes; l += V::width, at += V::width) f(V(), at, l);
    for (int64_t l = 0; l < c.tail; ++l, ++at) f(One<T>(), at, l);
}

template <class T>
struct Lanes {  // per-lane values of one plane
    std::vector<T> a, b, c, d, e;
    std::vector<double> rest;
    explicit Lanes(const Layout<T>& layout)
        : a(layout.lanes()), b(a), c(a), d(a), e(a), rest(layout.plane_channels()) {}
};

// Per channel: Σ over a chunk's lanes; sums of lanes are folded in their order.
template <class T>
void fold(const Layout<T>& layout, const std::vector<T>& lanes, double* channels) {
    std::fill_n(channels, layout.plane_channels(), 0.0);
    for (int64_t l = 0; l < layout.lanes(); ++l) channels[layout.channel_of(l)] += lanes[l];
}

template <class T>
double count_in(const Chunk& c, const Layout<T>& layout) {
    return static_cast<double>(c.rows * c.lanes + c.tail) / layout.plane_channels();
}

// Does the work of `chunk_statistics` in double, one element at a time.
template <class T>
void exact_statistics(const T* in, const Layout<T>& layout, const Chunk& c, double* mean, double* squares) {
    const int64_t channels = layout.plane_channels(), n = c.rows * c.lanes + c.tail;
    std::fill_n(mean, channels, 0.0);
    std::fill_n(squares, channels, 0.0);
    for (int64_t i = 0; i < n; ++i) mean[i % channels] += in[c.begin + i];
    for (int64_t k = 0; k < channels; ++k) mean[k] /= count_in(c, layout);
    for (int64_t i = 0; i < n; ++i) {
        const double d = in[c.begin + i] - mean[i % channels];
        squares[i % channels] += d * d;
    }
}

// stats: [chunk][2][plane's channels], the mean and Σ (x − mean)².
template <class T>
void chunk_statistics(const T* in, const Layout<T>& layout, int64_t chunk, double eps, double* stats, Lanes<T>& s) {
    const Chunk c = layout[chunk];
    const int64_t channels = layout.plane_channels();
    double *mean = stats + chunk * 2 * channels, *squares = mean + channels;
    std::fill(s.a.begin(), s.a.end(), T(0));
    T* const sum = s.a.data();
    each<T>(c, [=](auto v, int64_t at, int64_t l) {
        using V = decltype(v);
        (V::load(sum + l) + V::load(in + at)).store(sum + l);
    });
    fold(layout, s.a, mean);
    const double count = count_in(c, layout);
    for (int64_t k = 0; k < channels; ++k) mean[k] = static_cast<T>(mean[k] / count);
    for (int64_t l = 0; l < layout.lanes(); ++l) s.b[l] = static_cast<T>(mean[layout.channel_of(l)]);
    std::fill(s.a.begin(), s.a.end(), T(0));
    std::fill(s.c.begin(), s.c.end(), T(0));
    const T* const m = s.b.data();
    T* const square = s.c.data();
    each<T>(c, [=](auto v, int64_t at, int64_t l) {
        using V = decltype(v);
        const V d = V::load(in + at) - V::load(m + l);
        (V::load(sum + l) + d).store(sum + l);  // the mean's rounding error
        fma(d, d, V::load(square + l)).store(square + l);
    });
    fold(layout, s.a, s.rest.data());
    fold(layout, s.c, squares);
    for (int64_t k = 0; k < channels; ++k) {
        const double shift = s.rest[k] / count;
        mean[k] += shift;
        squares[k] -= count * shift * shift;
    }
    if constexpr (std::is_same_v<T, float>) {
        // From 1e19 on the squares of floats overflow; those below 1e-38 vanish, which only a smaller eps can tell.
        const double least = eps < kSmallSquare ? kSmallSquare * count : 0;
        for (int64_t k = 0; k < channels; ++k)
            if (!std::isfinite(squares[k]) || squares[k] < least)
                return exact_statistics(in, layout, c, mean, squares);
    }
}

template <class T>
void merge_statistics(const Layout<T>& layout, int64_t plane, const double* stats, double eps, T* mean, T* rstd) {
    const int64_t channels = layout.plane_channels();
    for (int64_t k = 0; k < channels; ++k) {
        double total = 0, m = 0, squares = 0;
        for (int64_t i = plane * layout.per_plane(); i < (plane + 1) * layout.per_plane(); ++i) {
            const double n = count_in(layout[i], layout), delta = stats[i * 2 * channels + k] - m;
            squares += stats[(i * 2 + 1) * channels + k] + delta * delta * total * n / (total + n);
            m += delta * n / (total + n);
            total += n;
        }
        mean[layout.first_channel(plane) + k] = static_cast<T>(m);
        rstd[layout.first_channel(plane) + k] = static_cast<T>(1 / std::sqrt(squares / total + eps));
    }
}

// a = mean, b = rstd · weight, c = bias: y = (x − a) · b + c.
template <class T>
void fill_lanes(const Layout<T>& layout, const Problem& p, int64_t plane, const T* mean, const T* rstd,
                const T* weight, const T* bias, Lanes<T>& s) {
    const int64_t first = layout.first_channel(plane), first_weight = first % p.channels;
    for (int64_t l = 0; l < layout.lanes(); ++l) {
        const int64_t i = first + layout.channel_of(l), channel = first_weight + layout.channel_of(l);
        s.a[l] = mean[i];
        s.b[l] = weight ? rstd[i] * weight[channel] : rstd[i];
        s.c[l] = bias ? bias[channel] : T(0);
    }
}

// v where it is positive, else v · slope.
template <class V, class T>
inline V activated(V v, V by, T slope) {
    if constexpr (V::width == 1)
        return {by.v > T(0) ? v.v : v.v * slope};
    else
        return {by.v > T(0) ? v.v : (v * V::all(slope)).v};
}

// The gradient before the activation; `y` is what was activated, without the residual.
template <class V, Sign kSign, class T>
inline V before_activation(V grad, V y, const T* signs, int64_t at, T slope) {
    if constexpr (kSign == Sign::recompute)
        return activated(grad, y, slope);
    else if constexpr (kSign == Sign::from_output)
        return activated(grad, V::load(signs + at), slope);
    else
        return activated(grad, y + V::load(signs + at), slope);
}

// Stores past the caches if the output won't be found in them again.
template <class V, class T>
inline void put(V v, T* to, bool stream) {
    stream ? v.stream(to) : v.store(to);
}

// A parallel region costs as much as some ten thousand elements.
int threads_for(const Problem& p) { return p.batch * p.channels * p.voxels < (1 << 15) ? 1 : p.threads; }

template <class T>
bool streamed(const T* out, const Problem& p, const Layout<T>& layout) {
    const int64_t plane = p.voxels * layout.plane_channels();
    const bool aligned = simd::is_aligned(out) && plane * sizeof(T) % simd::kBytes == 0;
    return aligned && p.batch * p.channels * p.voxels * static_cast<int64_t>(sizeof(T)) >= kStreamed;
}

// f(std::integral_constant<bool or Sign, …>) for the flags of a problem.
template <class F>
void with_flag(bool flag, const F& f) {
    flag ? f(std::true_type()) : f(std::false_type());
}
template <class F>
void with_sign(Sign sign, const F& f) {
    if (sign == Sign::recompute) f(std::integral_constant<Sign, Sign::recompute>());
    if (sign == Sign::from_output) f(std::integral_constant<Sign, Sign::from_output>());
    if (sign == Sign::with_residual) f(std::integral_constant<Sign, Sign::with_residual>());
}

}  // namespace

template <class T>
void forward(const T* in, const T* weight, const T* bias, const T* residual, T* out, T* mean, T* rstd,
             const Problem& p) {
    const Layout<T> layout(p);
    const int threads = threads_for(p);
    const auto scratch = [&] { return Lanes<T>(layout); };
    std::vector<double> stats(layout.count() * 2 * layout.plane_channels());
    parallel_for(layout.count(), threads, scratch,
                 [&](int64_t i, Lanes<T>& s) { chunk_statistics(in, layout, i, p.eps, stats.data(), s); });
    parallel_for(
        layout.count() / layout.per_plane(), threads, [] { return 0; },
        [&](int64_t plane, int) { merge_statistics(layout, plane, stats.data(), p.eps, mean, rstd); });
    const T slope = static_cast<T>(p.activate ? p.negative_slope : 1);
    const bool stream = streamed(out, p, layout);
    with_flag(residual != nullptr, [&](auto add) {
        with_flag(p.activate, [&](auto activate) {
            parallel_for(layout.count(), threads, scratch, [&](int64_t i, Lanes<T>& s) {
                fill_lanes(layout, p, layout.plane_of(i), mean, rstd, weight, bias, s);
                const T *const a = s.a.data(), *const b = s.b.data(), *const c = s.c.data();
                each<T>(layout[i], [=](auto v, int64_t at, int64_t l) {
                    using V = decltype(v);
                    V y = fma(V::load(in + at) - V::load(a + l), V::load(b + l), V::load(c + l));
                    if constexpr (add) y = y + V::load(residual + at);
                    if constexpr (activate) y = activated(y, y, slope);
                    put(y, out + at, stream);
                });
                if (stream) simd::finish_streams();
            });
        });
    });
}

template <class T>
void backward(const T* grad, const T* in, const T* weight, const T* bias, const T* signs, Sign sign, const T* mean,
              const T* rstd, T* grad_in, T* grad_weight, T* grad_bias, T* grad_residual, const Problem& p) {
    const Layout<T> layout(p);
    const int threads = threads_for(p);
    const int64_t channels = layout.plane_channels();
    const auto scratch = [&] { return Lanes<T>(layout); };
    const T slope = static_cast<T>(p.activate ? p.negative_slope : 1);
    // Σ g and Σ g · (x − mean) of each chunk, g being the gradient before the activation.
    std::vector<double> sums(layout.count() * 2 * channels);
    with_sign(sign, [&](auto kind) {
        parallel_for(layout.count(), threads, scratch, [&](int64_t i, Lanes<T>& s) {
            fill_lanes(layout, p, layout.plane_of(i), mean, rstd, weight, bias, s);
            std::fill(s.d.begin(), s.d.end(), T(0));
            std::fill(s.e.begin(), s.e.end(), T(0));
            const T *const a = s.a.data(), *const b = s.b.data(), *const c = s.c.data();
            T *const sum = s.d.data(), *const product = s.e.data();
            each<T>(layout[i], [=](auto v, int64_t at, int64_t l) {
                using V = decltype(v);
                const V d = V::load(in + at) - V::load(a + l);
                const V y = fma(d, V::load(b + l), V::load(c + l));
                const V g = before_activation<V, kind>(V::load(grad + at), y, signs, at, slope);
                (V::load(sum + l) + g).store(sum + l);
                fma(g, d, V::load(product + l)).store(product + l);
            });
            fold(layout, s.d, sums.data() + i * 2 * channels);
            fold(layout, s.e, sums.data() + (i * 2 + 1) * channels);
        });
    });
    // Per instance: the mean of g, and of g · (x − mean) / σ².
    std::vector<double> weight_sum(p.channels, 0.0), bias_sum(p.channels, 0.0);
    std::vector<T> mean_g(p.batch * p.channels), mean_gx(p.batch * p.channels);
    for (int64_t plane = 0; plane < layout.count() / layout.per_plane(); ++plane)
        for (int64_t k = 0; k < channels; ++k) {
            double g = 0, gx = 0;
            for (int64_t i = plane * layout.per_plane(); i < (plane + 1) * layout.per_plane(); ++i)
                g += sums[i * 2 * channels + k], gx += sums[(i * 2 + 1) * channels + k];
            const int64_t at = layout.first_channel(plane) + k;
            const double r = rstd[at];
            bias_sum[at % p.channels] += g;
            weight_sum[at % p.channels] += gx * r;
            mean_g[at] = static_cast<T>(g / p.voxels);
            mean_gx[at] = static_cast<T>(gx * r * r / p.voxels);
        }
    for (int64_t k = 0; k < p.channels; ++k) {
        if (grad_weight) grad_weight[k] = static_cast<T>(weight_sum[k]);
        if (grad_bias) grad_bias[k] = static_cast<T>(bias_sum[k]);
    }
    const bool stream = streamed(grad_in, p, layout);
    const bool stream_residual = grad_residual && streamed(grad_residual, p, layout);
    with_flag(grad_residual != nullptr, [&](auto keep) {
        with_sign(sign, [&](auto kind) {
            parallel_for(layout.count(), threads, scratch, [&](int64_t i, Lanes<T>& s) {
                fill_lanes(layout, p, layout.plane_of(i), mean, rstd, weight, bias, s);
                for (int64_t l = 0; l < layout.lanes(); ++l) {
                    const int64_t at = layout.first_channel(layout.plane_of(i)) + layout.channel_of(l);
                    s.d[l] = mean_g[at], s.e[l] = mean_gx[at];
                }
                const T *const a = s.a.data(), *const b = s.b.data(), *const c = s.c.data();
                const T *const mg = s.d.data(), *const mgx = s.e.data();
                each<T>(layout[i], [=](auto v, int64_t at, int64_t l) {
                    using V = decltype(v);
                    const V d = V::load(in + at) - V::load(a + l), scale = V::load(b + l);
                    const V y = fma(d, scale, V::load(c + l));
                    const V g = before_activation<V, kind>(V::load(grad + at), y, signs, at, slope);
                    if constexpr (keep) put(g, grad_residual + at, stream_residual);
                    put(scale * (g - V::load(mg + l) - d * V::load(mgx + l)), grad_in + at, stream);
                });
                if (stream || stream_residual) simd::finish_streams();
            });
        });
    });
}

#define MEDACCEL_INSTANTIATE(T)                                                                                    \
    template void forward(const T*, const T*, const T*, const T*, T*, T*, T*, const Problem&);                     \
    template void backward(const T*, const T*, const T*, const T*, const T*, Sign, const T*, const T*, T*, T*, T*, \
                           T*, const Problem&);
MEDACCEL_INSTANTIATE(float)
MEDACCEL_INSTANTIATE(double)

}  // namespace medaccel::instance_norm
