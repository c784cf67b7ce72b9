// SPDX-License-Identifier: Apache-2.0
// Shifted-window attention on the CPU.
//
// A job is one head and a few windows of one kind, which share their block of biases (forward and backward) and of
// the biases' gradients (backward). Jobs are cut by the problem's size alone, and what they sum up is added in the
// order of the jobs, so that the number of threads changes no bit.
//
// In a window that the shift has cut, tokens of different regions get −100 on their score. Where the scores of the
// window are provably so close that such a weight is less than e^−40 of its row's sum (as in any trained network),
// each region is attended to on its own, which saves the pairs between them; else the mask is added as it stands.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/parallel.h"
#include "head.h"
#include "window_attention.h"

namespace medaccel::window_attention {
namespace {

constexpr double kMasked = -100;
constexpr double kNegligible = 40;  // e^−40 · 343 keys: 1.5e-15

struct Job {
    int64_t kind, sample, first, count, head;  // windows first … of the kind's list, in this sample
};

int64_t padded_channels(const Problem& p) { return (p.head_dim + 3) / 4 * 4; }

// About 64 jobs, or one window each; heads innermost, because the heads of a token share its cache lines.
std::vector<Job> make_jobs(const Problem& p, const Geometry& geometry) {
    const int64_t all = p.batch * p.windows() * p.heads;
    const int64_t per_job = std::max<int64_t>(1, all / 64);
    std::vector<Job> jobs;
    const auto& kinds = geometry.kinds();
    for (int64_t sample = 0; sample < p.batch; ++sample)
        for (size_t kind = 0; kind < kinds.size(); ++kind) {
            const auto n = static_cast<int64_t>(kinds[kind].windows.size());
            for (int64_t first = 0; first < n; first += per_job)
                for (int64_t head = 0; head < p.heads; ++head)
                    jobs.push_back({static_cast<int64_t>(kind), sample, first, std::min(per_job, n - first), head});
        }
    return jobs;
}

template <class T>
class Attention {
  public:
    Attention(const T* qkv, const T* table, const int32_t* index, const T* pad, const Problem& p)
        : p_(p),
          geometry_(p, kLanes<T>),
          jobs_(make_jobs(p, geometry_)),
          qkv_(qkv),
          table_(table),
          pad_(pad),
          d_(static_cast<int>(padded_channels(p))),
          layout_(d_),
          zeros_(3 * p.channels(), T(0)) {
        const int64_t n = p.tokens();
        by_key_.resize(n * n);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) by_key_[j * n + i] = index[i * n + j];
        for (int64_t h = 0; h < p.heads; ++h) {
            double low = std::numeric_limits<double>::infinity(), high = -low, all = 0;
            for (int64_t row = 0; row < p.table_rows; ++row) {
                const double b = table[row * p.heads + h];
                low = std::min(low, b), high = std::max(high, b), all += b;
            }
            bias_range_.push_back(std::isfinite(all) ? high - low : std::numeric_limits<double>::infinity());
        }
    }

    void forward(T* out, T* lse) const {
        parallel_for(
            static_cast<int64_t>(jobs_.size()), p_.threads, [] { return Scratch(); },
            [&](int64_t j, Scratch& s) { forward_job(jobs_[j], out, lse, s); });
    }

    void backward(const T* grad, const T* out, const T* lse, T* grad_qkv, T* grad_table, T* grad_pad) const {
        const auto count = static_cast<int64_t>(jobs_.size());
        const int64_t rows = p_.table_rows, channels = p_.head_dim;
        std::vector<double> table_sums(grad_table ? count * rows : 0), pad_sums(grad_pad ? count * 3 * channels : 0);
        parallel_for(
            count, p_.threads, [] { return Scratch(); },
            [&](int64_t j, Scratch& s) {
                backward_job(jobs_[j], grad, out, lse, grad_qkv, grad_table ? table_sums.data() + j * rows : nullptr,
                             grad_pad ? pad_sums.data() + j * 3 * channels : nullptr, s);
            });
        const auto sum_jobs = [&](int64_t h, int64_t size, const std::vector<double>& sums) {
            std::vector<double> total(size, 0.0);
            for (int64_t j = 0; j < count; ++j)
                if (jobs_[j].head == h)
                    for (int64_t i = 0; i < size; ++i) total[i] += sums[j * size + i];
            return total;
        };
        for (int64_t h = 0; h < p_.heads; ++h) {
            if (grad_table) {
                const auto total = sum_jobs(h, rows, table_sums);
                for (int64_t r = 0; r < rows; ++r) grad_table[r * p_.heads + h] = static_cast<T>(total[r]);
            }
            if (grad_pad) {
                const auto total = sum_jobs(h, 3 * channels, pad_sums);
                for (int64_t part = 0; part < 3; ++part)
                    for (int64_t c = 0; c < channels; ++c)
                        grad_pad[part * p_.channels() + h * channels + c] =
                            static_cast<T>(total[part * channels + c]);
            }
        }
    }

  private:
    struct Scratch {
        Tiles<T> tiles;
        std::vector<int64_t> source;
        std::vector<T> q, k, v;                // a window's tokens, [tokens][d]
        std::vector<T> columns, keys, values;  // of a segment
        std::vector<T> grads, lse, delta;      // of a segment, by lanes
        std::vector<T> q_rows, grad_rows;      // of a segment, in `layout_`
        std::vector<T> bias, whole_bias;       // of the job's kind: by segments, and masked
        std::vector<T> bias_grad, whole_bias_grad;
    };

    const T* token(int64_t sample, int64_t source) const {
        if (source < 0) return pad_ ? pad_ : zeros_.data();
        return qkv_ + (sample * voxels() + source) * 3 * p_.channels();
    }
    int64_t voxels() const { return p_.sizes[0] * p_.sizes[1] * p_.sizes[2]; }

    // block[key][lane]: the bias of each pair, in base 2, with the mask where `region` is given.
    void fill_bias(const Segment& s, int64_t head, const uint8_t* region, T* block) const {
        const int64_t n = p_.tokens();
        for (size_t k = 0; k < s.keys.size(); ++k) {
            const int32_t* rows = by_key_.data() + s.keys[k] * n;
            T* line = block + k * s.lanes;
            for (size_t i = 0; i < s.queries.size(); ++i) {
                double b = table_[rows[s.queries[i]] * p_.heads + head];
                if (region && region[s.keys[k]] != region[s.queries[i]]) b += kMasked;
                line[i] = static_cast<T>(b * kLog2e);
            }
            std::fill(line + s.queries.size(), line + s.lanes, T(0));
        }
    }

    void scatter_bias_grad(const Segment& s, const T* block, double* table_sums) const {
        const int64_t n = p_.tokens();
        for (size_t k = 0; k < s.keys.size(); ++k) {
            const int32_t* rows = by_key_.data() + s.keys[k] * n;
            for (size_t i = 0; i < s.queries.size(); ++i) table_sums[rows[s.queries[i]]] += block[k * s.lanes + i];
        }
    }

    // One head's q, k and v of a window's tokens.
    void load_window(const Job& job, int64_t window, Scratch& s) const {
        geometry_.sources(window, s.source);
        const int64_t n = p_.tokens(), channels = p_.channels(), real = p_.head_dim;
        std::vector<T>* to[3] = {&s.q, &s.k, &s.v};
        for (int part = 0; part < 3; ++part) to[part]->assign(n * d_, T(0));
        for (int64_t t = 0; t < n; ++t)
            for (int part = 0; part < 3; ++part)
                copy_row(token(job.sample, s.source[t]) + part * channels + job.head * real,
                         to[part]->data() + t * d_);
    }

    void copy_row(const T* from, T* to) const {
        int64_t c = 0;
        for (; c + 4 <= p_.head_dim; c += 4) std::memcpy(to + c, from + c, 4 * sizeof(T));
        for (; c < p_.head_dim; ++c) to[c] = from[c];
    }

    // Tells whether the regions of a cut window may be kept apart: no two of its scores differ by more than 60.
    bool separable(const Job& job, const Scratch& s) const {
        if (p_.dropout_p > 0) return false;  // dropout numbers the pairs of the whole window
        double largest[2] = {0, 0}, all = 0;
        const std::vector<T>* rows[3] = {&s.q, &s.k, &s.v};
        for (int part = 0; part < 3; ++part)
            for (int64_t t = 0; t < p_.tokens(); ++t) {
                T square = 0;
                for (int c = 0; c < d_; ++c) square += (*rows[part])[t * d_ + c] * (*rows[part])[t * d_ + c];
                if (part < 2) largest[part] = std::max<double>(largest[part], square);
                all += square;  // not finite if any is not, which max may miss
            }
        const double spread = 2 * std::abs(p_.scale) * std::sqrt(largest[0] * largest[1]) + bias_range_[job.head];
        return std::isfinite(all) && spread <= -kMasked - kNegligible;
    }

    // [d][lanes] of a segment's queries, multiplied by `factor`; 0 in the lanes beyond. row_of(token): head_dim
    // channels.
    template <class RowOf>
    void load_columns(const Segment& s, const RowOf& row_of, T factor, std::vector<T>& columns) const {
        columns.assign(d_ * s.lanes, T(0));
        for (size_t i = 0; i < s.queries.size(); ++i) {
            const T* row = row_of(s.queries[i]);
            for (int64_t c = 0; c < p_.head_dim; ++c) columns[c * s.lanes + i] = row[c] * factor;
        }
    }

    // The same as rows in `layout_`.
    template <class RowOf>
    void load_rows(const Segment& s, const RowOf& row_of, T factor, std::vector<T>& rows) const {
        rows.assign(s.lanes / layout_.group * layout_.width(), T(0));
        for (size_t i = 0; i < s.queries.size(); ++i) {
            const T* row = row_of(s.queries[i]);
            T* to = rows.data() + layout_.at(i);
            for (int64_t c = 0; c < p_.head_dim; ++c) to[c * layout_.group] = row[c] * factor;
        }
    }

    // The segment's keys and values, in its order; the window's own rows where it is the whole window.
    void load_keys(const Segment& s, Scratch& scratch, const T*& keys, const T*& values) const {
        keys = scratch.k.data(), values = scratch.v.data();
        if (static_cast<int64_t>(s.keys.size()) == p_.tokens()) return;
        scratch.keys.resize(s.keys.size() * d_);
        scratch.values.resize(s.keys.size() * d_);
        for (size_t k = 0; k < s.keys.size(); ++k) {
            std::copy_n(scratch.k.data() + s.keys[k] * d_, d_, scratch.keys.data() + k * d_);
            std::copy_n(scratch.v.data() + s.keys[k] * d_, d_, scratch.values.data() + k * d_);
        }
        keys = scratch.keys.data(), values = scratch.values.data();
    }

    Dropout dropout(const Job& job, int64_t window) const {
        return {p_.dropout_seed, p_.dropout_threshold, static_cast<uint32_t>(window * p_.heads + job.head),
                static_cast<uint32_t>(job.sample), p_.dropout_p};
    }

    int64_t lse_row(const Job& job, int64_t window) const {
        return ((job.sample * p_.windows() + window) * p_.heads + job.head) * p_.tokens();
    }

    // Runs body(window, segment, its biases, its biases' gradients) for each window of the job and each of its
    // segments; grads: whether gradients of the biases are kept, in the scratch.
    template <class Body>
    void each_segment(const Job& job, bool grads, Scratch& s, const Body& body) const {
        const Kind& kind = geometry_.kinds()[job.kind];
        s.bias.clear(), s.whole_bias.clear();
        s.bias_grad.clear(), s.whole_bias_grad.clear();
        const auto prepare = [&](const Segment& segment, const uint8_t* region, T* block) {
            fill_bias(segment, job.head, region, block);
        };
        for (int64_t w = job.first; w < job.first + job.count; ++w) {
            const int64_t window = kind.windows[w];
            load_window(job, window, s);
            if (kind.cut() && !separable(job, s)) {
                if (s.whole_bias.empty()) {
                    s.whole_bias.resize(kind.whole.block_size());
                    if (grads) s.whole_bias_grad.assign(kind.whole.block_size(), T(0));
                    prepare(kind.whole, kind.region.data(), s.whole_bias.data());
                }
                body(window, kind.whole, s.whole_bias.data(), s.whole_bias_grad.data());
                continue;
            }
            if (s.bias.empty()) {
                s.bias.resize(kind.block_size);
                if (grads) s.bias_grad.assign(kind.block_size, T(0));
                for (const Segment& segment : kind.segments) prepare(segment, nullptr, s.bias.data() + segment.block);
            }
            for (const Segment& segment : kind.segments)
                body(window, segment, s.bias.data() + segment.block, s.bias_grad.data() + segment.block);
        }
    }

    void forward_job(const Job& job, T* out, T* lse, Scratch& s) const {
        const int64_t channels = p_.channels(), real = p_.head_dim;
        int64_t cleared = -1;
        each_segment(job, false, s, [&](int64_t window, const Segment& segment, const T* bias, T*) {
            T* lse_row_of = lse + lse_row(job, window);
            if (window != cleared) std::fill_n(lse_row_of, p_.tokens(), T(0));
            cleared = window;
            const T *keys, *values;
            load_keys(segment, s, keys, values);
            const auto q_row = [&](int32_t t) { return s.q.data() + t * d_; };
            load_columns(segment, q_row, static_cast<T>(p_.scale * kLog2e), s.columns);
            const Dropout drop = dropout(job, window);
            attend<T>(segment, d_, s.columns.data(), keys, values, bias, p_.dropout_p > 0 ? &drop : nullptr, s.tiles,
                      [&](int64_t first, int count, const T* columns, const T* sums, const T* base2) {
                          for (int i = 0; i < count; ++i) {
                              const int32_t t = segment.queries[first + i];
                              T* to = out + (job.sample * voxels() + s.source[t]) * channels + job.head * real;
                              const T inverse = 1 / sums[i];
                              for (int64_t c = 0; c < real; ++c) to[c] = columns[c * kLanes<T> + i] * inverse;
                              lse_row_of[t] = base2[i];
                          }
                      });
        });
    }

    void backward_job(const Job& job, const T* grad, const T* out, const T* lse, T* grad_qkv, double* table_sums,
                      double* pad_sums, Scratch& s) const {
        const int64_t channels = p_.channels(), real = p_.head_dim;
        const T scale = static_cast<T>(p_.scale);
        const auto place = [&](const T* map, int32_t t, int64_t width) {
            return map + (job.sample * voxels() + s.source[t]) * width + job.head * real;
        };
        each_segment(job, true, s, [&](int64_t window, const Segment& segment, const T* bias, T* bias_grad) {
            const T *keys, *values;
            load_keys(segment, s, keys, values);
            const auto q_row = [&](int32_t t) { return s.q.data() + t * d_; };
            load_columns(segment, q_row, static_cast<T>(p_.scale * kLog2e), s.columns);
            const auto grad_row = [&](int32_t t) { return place(grad, t, channels); };
            load_columns(segment, grad_row, T(1), s.grads);
            load_rows(segment, q_row, scale, s.q_rows);
            load_rows(segment, grad_row, T(1), s.grad_rows);
            s.delta.assign(segment.lanes, T(0));
            s.lse.assign(segment.lanes, T(0));
            for (size_t i = 0; i < segment.queries.size(); ++i) {
                const int32_t t = segment.queries[i];
                const T *g = grad_row(t), *o = place(out, t, channels);
                for (int64_t c = 0; c < real; ++c) s.delta[i] += g[c] * o[c];
                s.lse[i] = lse[lse_row(job, window) + t];
            }
            const auto emit = [&](int64_t first, int count, const T* columns) {
                for (int i = 0; i < count; ++i) {
                    T* to = const_cast<T*>(place(grad_qkv, segment.queries[first + i], 3 * channels));
                    for (int64_t c = 0; c < real; ++c) to[c] = columns[c * kLanes<T> + i] * scale;
                }
            };
            const Dropout drop = dropout(job, window);
            attend_backward<T>(segment, d_, layout_, s.columns.data(), keys, values, bias, s.grads.data(),
                               s.q_rows.data(), s.grad_rows.data(), s.lse.data(), s.delta.data(),
                               p_.dropout_p > 0 ? &drop : nullptr, bias_grad, s.tiles, emit);
            for (size_t k = 0; k < segment.keys.size(); ++k) {
                const int32_t t = segment.keys[k];
                const bool padding = s.source[t] < 0;
                T* to = padding ? nullptr : const_cast<T*>(place(grad_qkv, t, 3 * channels));
                for (int64_t c = 0; c < real; ++c) {
                    T gk = 0, gv = 0;
                    for (int g = 0; g < layout_.group; ++g) {
                        const int64_t at = k * layout_.width() + c * layout_.group + g;
                        gk += s.tiles.key_sums[at], gv += s.tiles.value_sums[at];
                    }
                    if (!padding) {
                        to[channels + c] = gk, to[2 * channels + c] = gv;
                    } else if (pad_sums) {
                        pad_sums[real + c] += gk, pad_sums[2 * real + c] += gv;  // nobody reads a padded query
                    }
                }
            }
        });
        if (!table_sums) return;
        const Kind& kind = geometry_.kinds()[job.kind];
        if (!s.bias_grad.empty())
            for (const Segment& segment : kind.segments)
                scatter_bias_grad(segment, s.bias_grad.data() + segment.block, table_sums);
        if (!s.whole_bias_grad.empty()) scatter_bias_grad(kind.whole, s.whole_bias_grad.data(), table_sums);
    }

    Problem p_;
    Geometry geometry_;
    std::vector<Job> jobs_;
    const T *qkv_, *table_, *pad_;
    int d_;
    RowLayout<T> layout_;
    std::vector<T> zeros_;
    std::vector<int32_t> by_key_;  // index, transposed: [key][query]
    std::vector<double> bias_range_;
};

}  // namespace

template <class T>
void forward(const T* qkv, const T* table, const int32_t* index, const T* pad_qkv, T* out, T* lse,
             const Problem& problem) {
    Attention<T>(qkv, table, index, pad_qkv, problem).forward(out, lse);
}

template <class T>
void backward(const T* grad, const T* qkv, const T* table, const int32_t* index, const T* pad_qkv, const T* out,
              const T* lse, T* grad_qkv, T* grad_table, T* grad_pad, const Problem& problem) {
    Attention<T>(qkv, table, index, pad_qkv, problem).backward(grad, out, lse, grad_qkv, grad_table, grad_pad);
}

#define MEDACCEL_INSTANTIATE(T)                                                                                    \
    template void forward(const T*, const T*, const int32_t*, const T*, T*, T*, const Problem&);                   \
    template void backward(const T*, const T*, const T*, const int32_t*, const T*, const T*, const T*, T*, T*, T*, \
                           const Problem&);
MEDACCEL_INSTANTIATE(float)
MEDACCEL_INSTANTIATE(double)

}  // namespace medaccel::window_attention
