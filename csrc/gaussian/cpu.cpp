// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "gaussian.h"
#include "march.h"

namespace medaccel::gaussian {
namespace {

// The ring of a job should stay in the second-level cache, beside the rows that stream through it.
constexpr int64_t kRingBytes = 256 << 10;
// Outputs larger than this are not in cache any more when they are complete.
constexpr int64_t kCacheBytes = 32 << 20;
// Below this many multiply-adds, starting threads costs more than they save.
constexpr int64_t kSerialWork = 1 << 18;
// Lines longer than this are cut, unless their border reaches across the cut.
constexpr int64_t kLineLength = 512;

template <class T>
struct Plan {
    Layout layout;
    Axis<T> axes[3];
    int64_t planes = 1, blocks = 1, tiles = 1, jobs = 0;
    int threads = 1;
    bool large = false;  // the output is larger than caches are

    // The longest run of columns that a block reads, without the border.
    int64_t columns() const {
        const int64_t width = ceil_div(layout.size[2], tiles) + 2 * axes[2].radius;
        return std::min(layout.size[2], width);
    }
    int64_t capacity() const { return ring_rows(layout.size[1], axes[1].radius, axes[1].reaches_far()); }

    Block block(int64_t job, int64_t* outer) const {
        const int64_t tile = job % tiles, b = job / tiles % blocks;
        *outer = job / tiles / blocks;
        Block r;
        r.z0 = b * planes;
        r.z1 = std::min(layout.size[0], r.z0 + planes);
        r.x0 = layout.size[2] * tile / tiles;
        r.x1 = layout.size[2] * (tile + 1) / tiles;
        r.xa = std::max<int64_t>(0, r.x0 - axes[2].radius);
        r.xb = std::min(layout.size[2], r.x1 + axes[2].radius);
        return r;
    }
};

template <class T>
Plan<T> make_plan(const Layout& layout, const double* sigma, bool adjoint, bool derivative, const Settings& s) {
    Plan<T> plan;
    plan.layout = layout;
    int64_t taps = 0;
    for (int i = 0; i < 3; ++i) {
        const double value = layout.axis[i] < 0 ? 0.0 : sigma[layout.axis[i]];
        plan.axes[i] =
            make_axis<T>(layout.size[i], value, adjoint, derivative, s, i > 0 ? &plan.axes[i - 1] : nullptr);
        taps += plan.axes[i].count();
    }
    const int64_t outer = layout.outer[0] * layout.outer[1];
    const int64_t voxels = outer * layout.size[0] * layout.size[1] * layout.size[2] * layout.lanes;
    plan.large = voxels * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
    plan.threads = voxels * taps < kSerialWork ? 1 : s.threads;

    if (!plan.axes[2].reaches_far())
        plan.tiles =
            std::max<int64_t>(1, layout.size[2] / std::max<int64_t>(kLineLength, 2 * plan.axes[2].radius + 2));
    const int64_t row_bytes = plan.columns() * layout.lanes * static_cast<int64_t>(sizeof(T));
    plan.planes = 2 * kRows;
    const bool cramped = plan.planes * plan.capacity() * row_bytes > kRingBytes;
    const bool too_few = outer * ceil_div(layout.size[0], plan.planes) * plan.tiles < 4 * plan.threads;
    if (cramped || too_few) plan.planes = kRows;
    plan.blocks = ceil_div(layout.size[0], plan.planes);
    plan.jobs = outer * plan.blocks * plan.tiles;
    return plan;
}

// The buffers of one thread, made once per thread, so that a job allocates nothing.
template <class T>
struct Scratch {
    std::vector<T> zeros;
    Slab<T> slab, slab_derivative;
    Lines<T> lines;
    std::vector<T> row, row_adjoint;
    std::vector<const T*> rows;

    Scratch(const Plan<T>& p, bool gradient)
        : zeros(p.columns() * p.layout.lanes, T(0)),
          slab(p.planes, p.capacity(), zeros.size(), zeros.data()),
          slab_derivative(gradient ? p.planes : 0, p.capacity(), zeros.size(), zeros.data()),
          lines(p.columns(), p.axes[2].radius, p.layout.lanes) {
        if (gradient) row.resize(kRows * zeros.size()), row_adjoint.resize(row.size());
    }
    Scratch(Scratch&&) = delete;  // the slabs point into it
};

template <class T>
void filter_block(const Plan<T>& plan, const T* in, T* out, const Block& b, Scratch<T>& s) {
    const Layout& l = plan.layout;
    const Axis<T>&z = plan.axes[0], &y = plan.axes[1], &x = plan.axes[2];
    const int64_t n = (b.xb - b.xa) * l.lanes;
    s.slab.start(z, z.taps.data(), in + b.xa * l.lanes, l.in_stride[0], l.in_stride[1], b, n);
    for (int64_t y0 = 0; y0 < l.size[1]; y0 += kRows) {
        const int64_t y1 = std::min(l.size[1], y0 + kRows);
        s.slab.fill(y.reaches_far() ? l.size[1] : std::min(l.size[1], y1 + y.radius));
        for (int64_t j = 0; j < b.z1 - b.z0; ++j) {
            T* to[kRows];
            T* written[kRows];
            for (int64_t i = 0; i < y1 - y0; ++i) {
                to[i] = out + (b.z0 + j) * l.out_stride[0] + (y0 + i) * l.out_stride[1] + b.x0 * l.lanes;
                written[i] = x.identity() ? to[i] : s.lines.interior(x, b, i);
            }
            if (y.identity())
                for (int64_t i = 0; i < y1 - y0; ++i) std::memcpy(written[i], s.slab.row(j, y0 + i), n * sizeof(T));
            else
                combine_along(
                    y, y.taps.data(), [&](int64_t source) { return s.slab.row(j, source); }, s.zeros.data(), y0, y1,
                    written, n, s.rows);
            if (!x.identity()) s.lines.convolve(x, x.taps.data(), b, y1 - y0, to, plan.large);
        }
    }
}

// Adds the block's part of the gradient to sum[3] (z, y, x). With A, A' the z-filtered rows (taps,
// derivative) and B = y(A), the three gradients are ⟨g, x(y(A'))⟩, ⟨g, x(y'(A))⟩ and ⟨g, x'(B)⟩; moving x
// over to g by its adjoint makes the first two dot products with one line x*(g).
template <class T>
void gradient_block(const Plan<T>& plan, const Axis<T>& x_adjoint, const T* in, const T* grad, const Block& b,
                    double* sum, Scratch<T>& s) {
    const Layout& l = plan.layout;
    const Axis<T>&z = plan.axes[0], &y = plan.axes[1], &x = plan.axes[2];
    const int64_t n = l.size[2] * l.lanes;
    s.slab.start(z, z.taps.data(), in, l.in_stride[0], l.in_stride[1], b, n);
    s.slab_derivative.start(z, z.derivative.data(), in, l.in_stride[0], l.in_stride[1], b, n);
    for (int64_t y0 = 0; y0 < l.size[1]; y0 += kRows) {
        const int64_t y1 = std::min(l.size[1], y0 + kRows), filled = y.reaches_far() ? l.size[1] : y1 + y.radius;
        s.slab.fill(std::min(l.size[1], filled));
        if (!z.identity()) s.slab_derivative.fill(std::min(l.size[1], filled));
        for (int64_t j = 0; j < b.z1 - b.z0; ++j) {
            const T *g[kRows], *g_adjoint[kRows];
            T *rows[kRows], *adjoint_rows[kRows], *interiors[kRows];
            for (int64_t i = 0; i < y1 - y0; ++i) {
                g[i] = grad + (b.z0 + j) * l.out_stride[0] + (y0 + i) * l.out_stride[1];
                rows[i] = s.row.data() + i * n;
                adjoint_rows[i] = s.row_adjoint.data() + i * n;
                g_adjoint[i] = x.identity() ? g[i] : adjoint_rows[i];
                interiors[i] = s.lines.interior(x, b, i);
                if (!x.identity()) std::memcpy(s.lines.interior(x_adjoint, b, i), g[i], n * sizeof(T));
            }
            if (!x.identity()) s.lines.convolve(x_adjoint, x_adjoint.taps.data(), b, y1 - y0, adjoint_rows);
            const auto y_filtered = [&](Slab<T>& slab, const std::vector<T>& taps, T* const* to) {
                if (y.identity())
                    for (int64_t i = 0; i < y1 - y0; ++i) std::memcpy(to[i], slab.row(j, y0 + i), n * sizeof(T));
                else
                    combine_along(
                        y, taps.data(), [&](int64_t source) { return slab.row(j, source); }, s.zeros.data(), y0, y1,
                        to, n, s.rows);
            };
            if (!z.identity()) {
                y_filtered(s.slab_derivative, y.taps, rows);
                for (int64_t i = 0; i < y1 - y0; ++i) sum[0] += dot(g_adjoint[i], rows[i], n);
            }
            if (!y.identity()) {
                y_filtered(s.slab, y.derivative, rows);
                for (int64_t i = 0; i < y1 - y0; ++i) sum[1] += dot(g_adjoint[i], rows[i], n);
            }
            if (!x.identity()) {
                y_filtered(s.slab, y.taps, interiors);
                s.lines.convolve(x, x.derivative.data(), b, y1 - y0, rows);
                for (int64_t i = 0; i < y1 - y0; ++i) sum[2] += dot(g[i], rows[i], n);
            }
        }
    }
}

}  // namespace

template <class T>
bool filter(const T* in, T* out, const Shape& shape, const Shape& in_strides, const Shape& out_strides,
            const double* sigma, bool adjoint, const Settings& settings) {
    if (element_count(shape) == 0) return true;
    for (size_t a = 2; a < shape.size(); ++a) check_axis(shape[a]);
    Layout layout;
    if (!make_layout(shape, in_strides, out_strides, layout)) return false;
    const Plan<T> plan = make_plan<T>(layout, sigma, adjoint, false, settings);
    parallel_for(
        plan.jobs, plan.threads, [&] { return Scratch<T>(plan, false); },
        [&](int64_t job, Scratch<T>& scratch) {
            int64_t outer;
            const Block block = plan.block(job, &outer);
            const int64_t batch = outer / layout.outer[1], channel = outer % layout.outer[1];
            filter_block(plan, in + batch * layout.in_outer[0] + channel * layout.in_outer[1],
                         out + batch * layout.out_outer[0] + channel * layout.out_outer[1], block, scratch);
        });
    return true;
}

template <class T>
bool sigma_gradient(const T* in, const T* grad, const Shape& shape, const Shape& in_strides,
                    const Shape& grad_strides, const double* sigma, double* gradient, const Settings& settings) {
    for (size_t a = 2; a < shape.size(); ++a) gradient[a - 2] = 0;
    if (element_count(shape) == 0) return true;
    for (size_t a = 2; a < shape.size(); ++a) check_axis(shape[a]);
    Layout layout;
    if (!make_layout(shape, in_strides, grad_strides, layout)) return false;
    Plan<T> plan = make_plan<T>(layout, sigma, false, true, settings);
    const double x_sigma = sigma[layout.axis[2]];
    const Axis<T> x_adjoint = make_axis<T>(layout.size[2], x_sigma, true, false, settings, nullptr);
    plan.tiles = 1;       // whole lines: they are dotted, not written
    plan.planes = kRows;  // the partition must not follow the thread count: it orders the sums
    plan.blocks = ceil_div(layout.size[0], plan.planes);
    plan.jobs = layout.outer[0] * layout.outer[1] * plan.blocks;
    std::vector<double> partial(3 * plan.jobs, 0.0);
    parallel_for(
        plan.jobs, plan.threads, [&] { return Scratch<T>(plan, true); },
        [&](int64_t job, Scratch<T>& scratch) {
            int64_t outer;
            const Block block = plan.block(job, &outer);
            const int64_t batch = outer / layout.outer[1], channel = outer % layout.outer[1];
            gradient_block(plan, x_adjoint, in + batch * layout.in_outer[0] + channel * layout.in_outer[1],
                           grad + batch * layout.out_outer[0] + channel * layout.out_outer[1], block,
                           partial.data() + 3 * job, scratch);
        });
    for (int i = 0; i < 3; ++i) {
        if (layout.axis[i] < 0) continue;
        double total = 0;
        for (int64_t job = 0; job < plan.jobs; ++job) total += partial[3 * job + i];
        gradient[layout.axis[i]] = total;
    }
    return true;
}

template bool filter(const float*, float*, const Shape&, const Shape&, const Shape&, const double*, bool,
                     const Settings&);
template bool filter(const double*, double*, const Shape&, const Shape&, const Shape&, const double*, bool,
                     const Settings&);
template bool sigma_gradient(const float*, const float*, const Shape&, const Shape&, const Shape&, const double*,
                             double*, const Settings&);
template bool sigma_gradient(const double*, const double*, const Shape&, const Shape&, const Shape&, const double*,
                             double*, const Settings&);

}  // namespace medaccel::gaussian
