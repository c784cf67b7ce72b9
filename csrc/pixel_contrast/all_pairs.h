// SPDX-License-Identifier: Apache-2.0
// Log-sum-exps of a query's scores with all keys, and their gradients, tile by tile.
//
// Forward: a job owns some tiles of queries and walks over all keys with an online log-sum-exp. Backward: queries and
// keys are cut into as many chunks each; in turn t, a job adds up the gradients of query chunk i and key chunk i + t
// (mod chunks), which no other job of the turn touches: no sums have to be merged, and their order is the same for
// every number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/exp2.h"
#include "unit_rows.h"

namespace medaccel::pixel_contrast {

constexpr double kLog2e = 1.4426950408889634074;

// Per sample, the queries (numbered within the batch) that are wanted.
inline std::vector<std::vector<int64_t>> rows_where(int64_t batch, int64_t queries, const std::vector<char>& wanted) {
    std::vector<std::vector<int64_t>> rows(batch);
    for (int64_t i = 0; i < batch * queries; ++i)
        if (wanted[i]) rows[i / queries].push_back(i);
    return rows;
}

template <class T>
class AllPairs {
  public:
    // rows: per sample, the queries that matter, within the batch. self: key j of a query's own number i − start +
    // self is left out, where self ≥ 0 (start: the sample's first query).
    AllPairs(const UnitRows<T>& query, const UnitRows<T>& key, const std::vector<std::vector<int64_t>>& rows,
             int64_t queries, int64_t keys, int64_t channels, double temperature, int64_t self, int threads)
        : query_(query),
          key_(key),
          rows_(rows),
          queries_(queries),
          keys_(keys),
          channels_(static_cast<int>(channels)),
          temperature_(temperature),
          self_(self),
          threads_(threads) {}

    // done(row, lse): the base-2 log-sum-exp of each row that matters, in double.
    template <class Done>
    void forward(const Done& done) const {
        struct Job {
            int64_t sample, first;
        };
        std::vector<Job> jobs;
        for (size_t b = 0; b < rows_.size(); ++b)
            for (size_t first = 0; first < rows_[b].size(); first += kGroup * kLanes<T>)
                jobs.push_back({static_cast<int64_t>(b), static_cast<int64_t>(first)});
        struct Scratch {
            std::vector<T> columns, tile;
            std::vector<Running> running;
        };
        parallel_for(
            static_cast<int64_t>(jobs.size()), threads_,
            [&] {
                return Scratch{std::vector<T>(kGroup * channels_ * kLanes<T>), std::vector<T>(kKeys * kLanes<T>),
                               std::vector<Running>(kGroup)};
            },
            [&](int64_t j, Scratch& s) {
                const auto [sample, first] = jobs[j];
                const std::vector<int64_t>& rows = rows_[sample];
                const int64_t last = std::min<int64_t>(rows.size(), first + kGroup * kLanes<T>);
                const int64_t tiles = (last - first + kLanes<T> - 1) / kLanes<T>;
                for (int64_t t = 0; t < tiles; ++t) {
                    load_columns(rows, first + t * kLanes<T>, s.columns.data() + t * channels_ * kLanes<T>);
                    s.running[t] = Running();
                }
                for (int64_t k = 0; k < keys_; k += kKeys) {
                    const int n = static_cast<int>(std::min<int64_t>(kKeys, keys_ - k));
                    for (int64_t t = 0; t < tiles; ++t)
                        add_tile(sample, first + t * kLanes<T>, k, n, s.columns.data() + t * channels_ * kLanes<T>,
                                 s.tile.data(), s.running[t]);
                }
                for (int64_t i = first; i < last; ++i) {
                    const Running& r = s.running[(i - first) / kLanes<T>];
                    const int lane = static_cast<int>((i - first) % kLanes<T>);
                    done(rows[i], r.top[lane] + std::log2(r.sum[lane]));
                }
            });
    }

    // Adds to query_sums and key_sums (the gradients by the unit vectors, [n][width]; empty: not wanted) those of
    // Σ weight[row] · temperature · lse[row] · ln 2. weight and lse are by row of the batch.
    void backward(const T* weight, const T* lse, std::vector<T>& query_sums, std::vector<T>& key_sums) const {
        const auto samples = static_cast<int64_t>(rows_.size());
        const int64_t chunks = std::clamp<int64_t>((std::max(queries_, keys_) + kChunk - 1) / kChunk, 1, kMaxChunks);
        for (int64_t turn = 0; turn < chunks; ++turn)
            parallel_for(
                samples * chunks, threads_, [] { return Chunk(); },
                [&](int64_t job, Chunk& s) {
                    const int64_t sample = job / chunks, mine = job % chunks, theirs = (mine + turn) % chunks;
                    const auto count = static_cast<int64_t>(rows_[sample].size());
                    const auto [first, last] = share(count, mine, chunks, kLanes<T>);
                    const auto [key_first, key_last] = share(keys_, theirs, chunks, kKeys);
                    if (first < last && key_first < key_last)
                        backward_chunk(sample, first, last, key_first, key_last, weight, lse, query_sums, key_sums,
                                       s);
                });
    }

  private:
    static constexpr int64_t kGroup = 8;  // tiles of queries that share a pass over the keys
    // Pixels of a chunk: the threads meet after each turn, so a chunk is some milliseconds of work, and from 16³
    // pixels on there are at least 8 jobs a turn. More chunks than 64 would buy nothing.
    static constexpr int64_t kChunk = 512, kMaxChunks = 64;

    struct Running {  // per lane: the largest score so far, and Σ 2^(score − top)
        T top[kLanes<T>];
        double sum[kLanes<T>] = {};
        Running() { std::fill_n(top, kLanes<T>, -std::numeric_limits<T>::infinity()); }
    };

    struct Chunk {
        std::vector<T> columns, rows, sums;  // of the chunk's queries, tile by tile
        std::vector<T> weight, shift, tile;
    };

    static std::pair<int64_t, int64_t> share(int64_t n, int64_t index, int64_t parts, int64_t unit) {
        const int64_t size = ((n + parts - 1) / parts + unit - 1) / unit * unit;
        return {std::min(n, index * size), std::min(n, (index + 1) * size)};
    }

    // columns [channels][kLanes]: log2(e) / temperature times the unit vectors, so that scores come in base 2.
    void load_columns(const std::vector<int64_t>& rows, int64_t first, T* columns) const {
        const T factor = static_cast<T>(kLog2e / temperature_);
        const int64_t n = std::min<int64_t>(kLanes<T>, rows.size() - first);
        std::fill_n(columns, channels_ * kLanes<T>, T(0));
        for (int64_t i = 0; i < n; ++i) {
            const T* row = query_.row(rows[first + i]);
            for (int c = 0; c < channels_; ++c) columns[c * kLanes<T> + i] = factor * row[c];
        }
    }

    const T* keys_at(int64_t sample, int64_t k) const { return key_.row(sample * keys_ + k); }

    // exclude(tile index) for each pair of the tile that is left out.
    template <class Exclude>
    void each_self(int64_t sample, int64_t first, int64_t k, int n, const Exclude& exclude) const {
        if (self_ < 0) return;
        const std::vector<int64_t>& rows = rows_[sample];
        const int64_t end = std::min<int64_t>(rows.size(), first + kLanes<T>);
        for (int64_t i = first; i < end; ++i) {
            const int64_t j = rows[i] - sample * queries_ + self_ - k;
            if (0 <= j && j < n) exclude(j * kLanes<T> + i - first);
        }
    }

    void add_tile(int64_t sample, int64_t first, int64_t k, int n, const T* columns, T* tile, Running& r) const {
        constexpr int W = Vec<T>::width;
        Vec<T> top[2] = {Vec<T>::load(r.top), Vec<T>::load(r.top + W)};
        scores<T>(n, channels_, keys_at(sample, k), key_.width, columns, tile, top);
        bool excluded = false;
        each_self(sample, first, k, n, [&](int64_t at) {
            tile[at] = -std::numeric_limits<T>::infinity();
            excluded = true;
        });
        if (excluded) {  // the maxima without them
            top[0] = Vec<T>::load(r.top), top[1] = Vec<T>::load(r.top + W);
            for (int i = 0; i < n; ++i)
                for (int h = 0; h < 2; ++h) top[h] = max(Vec<T>::load(tile + i * kLanes<T> + h * W), top[h]);
        }
        Vec<T> sum[2] = {};
        exponentials(n, tile, top, [&](int, Vec<T>(&x)[2]) { sum[0] = sum[0] + x[0], sum[1] = sum[1] + x[1]; });
        for (int i = 0; i < kLanes<T>; ++i) {
            const T larger = top[i / W][i % W];
            if (larger > r.top[i]) {
                r.sum[i] *= std::exp2(double(r.top[i]) - larger);
                r.top[i] = larger;
            }
            r.sum[i] += sum[i / W][i % W];
        }
    }

    // each(key, 2^(tile row − shift)) for the tile's rows, four at a time through the exponential.
    template <class Each>
    static void exponentials(int n, const T* tile, const Vec<T> (&shift)[2], const Each& each) {
        constexpr int W = Vec<T>::width;
        const auto some = [&](int first, auto count) {
            constexpr int K = decltype(count)::value;
            Vec<T> x[2 * K];
#pragma GCC unroll 8
            for (int i = 0; i < 2 * K; ++i) x[i] = Vec<T>::load(tile + first * kLanes<T> + i * W) - shift[i % 2];
            simd::exp2(x);
#pragma GCC unroll 4
            for (int i = 0; i < K; ++i) {
                Vec<T> row[2] = {x[2 * i], x[2 * i + 1]};
                each(first + i, row);
            }
        };
        int i = 0;
        for (; i + 4 <= n; i += 4) some(i, std::integral_constant<int, 4>());
        for (; i < n; ++i) some(i, std::integral_constant<int, 1>());
    }

    void backward_chunk(int64_t sample, int64_t first, int64_t last, int64_t key_first, int64_t key_last,
                        const T* weight, const T* lse, std::vector<T>& query_sums, std::vector<T>& key_sums,
                        Chunk& s) const {
        constexpr int W = Vec<T>::width, L = kLanes<T>;
        const std::vector<int64_t>& rows = rows_[sample];
        const int64_t tiles = (last - first + L - 1) / L, width = query_.width;
        s.columns.resize(tiles * channels_ * L);
        s.rows.assign(tiles * L * width, T(0));
        s.sums.assign(tiles * channels_ * L, T(0));
        s.weight.assign(tiles * L, T(0));
        s.shift.assign(tiles * L, T(0));
        s.tile.resize(kKeys * L);
        for (int64_t i = first; i < last; ++i) {
            std::copy_n(query_.row(rows[i]), width, s.rows.data() + (i - first) * width);
            s.weight[i - first] = weight[rows[i]];
            s.shift[i - first] = lse[rows[i]];
        }
        for (int64_t t = 0; t < tiles; ++t) load_columns(rows, first + t * L, s.columns.data() + t * channels_ * L);
        for (int64_t k = key_first; k < key_last; k += kKeys) {
            const int n = static_cast<int>(std::min<int64_t>(kKeys, key_last - k));
            const T* keys = keys_at(sample, k);
            for (int64_t t = 0; t < tiles; ++t) {
                const T* shift = s.shift.data() + t * L;
                const Vec<T> shifts[2] = {Vec<T>::load(shift), Vec<T>::load(shift + W)};
                Vec<T> unused[2] = {};
                scores<T>(n, channels_, keys, key_.width, s.columns.data() + t * channels_ * L, s.tile.data(),
                          unused);
                const T* w = s.weight.data() + t * L;
                const Vec<T> weights[2] = {Vec<T>::load(w), Vec<T>::load(w + W)};
                exponentials(n, s.tile.data(), shifts, [&](int i, Vec<T>(&x)[2]) {
                    (x[0] * weights[0]).store(s.tile.data() + i * L);
                    (x[1] * weights[1]).store(s.tile.data() + i * L + W);
                });
                each_self(sample, first + t * L, k, n, [&](int64_t at) { s.tile[at] = 0; });
                if (!query_sums.empty())
                    add_to_queries<T>(n, channels_, keys, key_.width, s.tile.data(),
                                      s.sums.data() + t * channels_ * L);
                if (!key_sums.empty())
                    add_to_keys<T>(n, s.tile.data(), s.rows.data() + t * L * width, width,
                                   key_sums.data() + (sample * keys_ + k) * width);
            }
        }
        if (query_sums.empty()) return;
        for (int64_t i = first; i < last; ++i) {
            const T* from = s.sums.data() + (i - first) / L * channels_ * L + (i - first) % L;
            for (int c = 0; c < channels_; ++c) query_sums[rows[i] * width + c] += from[c * L];
        }
    }

    const UnitRows<T>&query_, &key_;
    const std::vector<std::vector<int64_t>>& rows_;
    int64_t queries_, keys_;
    int channels_;
    double temperature_;
    int64_t self_;
    int threads_;
};

}  // namespace medaccel::pixel_contrast
