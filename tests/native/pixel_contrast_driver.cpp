// SPDX-License-Identifier: Apache-2.0
// Runs the pixel contrast's CPU kernels over odd numbers of pixels and channels, up to several chunks of them,
// without Python or torch in the process: for the sanitizers, and with registers of any width. Losses and gradients
// are compared with plain loops over all pairs.
#include "../../csrc/pixel_contrast/pixel_contrast.h"

#include "cpu_driver.h"

using namespace medaccel::pixel_contrast;
using driver::Buffer;

namespace {

struct Worst {
    double error = 0;
    template <class T>
    void compare(const Buffer<T>& ours, const std::vector<double>& truth) {
        double largest = 1;
        for (double t : truth) largest = std::max(largest, std::fabs(t));
        for (int64_t i = 0; i < ours.n; ++i) {
            const double e = std::fabs(ours[i] - truth[i]) / largest;
            if (!(e <= error)) error = e;
        }
    }
};

enum Wanted { both, query_alone, key_alone };  // gradients

template <class T, class U>
double check(const Problem& p, double radius_value, Wanted wanted) {
    const int64_t n = p.batch * p.queries, m = p.batch * p.keys, channels = p.channels;
    Buffer<T> query(n * channels), key(m * channels), loss(n), lse(n), positive_lse(n), grad(n), grad_query(query.n),
        grad_key(key.n);
    Buffer<U> query_coords(n * p.axes), key_coords(m * p.axes), radius(p.batch);
    query.randomize(1), key.randomize(3), grad.randomize(1), query_coords.randomize(1), key_coords.randomize(1);
    for (int64_t b = 0; b < p.batch; ++b) radius[b] = static_cast<U>(radius_value);
    if (query.n > 0) std::fill_n(query.get(), channels, T(0));  // a zero vector
    for (int64_t i = 2; i < n; i += 5) grad[i] = 0;             // whose queries are skipped
    T* const to_query = wanted == key_alone ? nullptr : grad_query.get();
    T* const to_key = wanted == query_alone ? nullptr : grad_key.get();
    if (key_coords.n > 0) key_coords[0] = std::numeric_limits<U>::quiet_NaN();
    forward(query.get(), key.get(), query_coords.get(), key_coords.get(), radius.get(), loss.get(), lse.get(),
            positive_lse.get(), p);
    backward(grad.get(), query.get(), key.get(), query_coords.get(), key_coords.get(), radius.get(), lse.get(),
             positive_lse.get(), to_query, to_key, p);
    const auto q = query.doubles(), k = key.doubles();
    const auto uq = driver::unit(q, channels), uk = driver::unit(k, channels);
    std::vector<double> losses(n, 0.0), gq(q.size(), 0.0), gk(k.size(), 0.0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = 0; i < p.queries; ++i) {
            const int64_t row = b * p.queries + i;
            const double* qi = &uq[row * channels];
            std::vector<double> e(p.keys);
            std::vector<char> positive(p.keys);
            double all = 0, positives = 0;
            for (int64_t j = 0; j < p.keys; ++j) {
                const int64_t other = b * p.keys + j;
                U squared = 0;
                const double s = driver::dot(qi, &uk[other * channels], channels);
                for (int64_t a = 0; a < p.axes; ++a) {
                    const U d = query_coords[row * p.axes + a] - key_coords[other * p.axes + a];
                    squared += d * d;
                }
                e[j] = std::exp(s / p.temperature);
                positive[j] = squared < radius[b] * radius[b];
                all += e[j];
                if (positive[j]) positives += e[j];
            }
            if (positives == 0) continue;
            losses[row] = std::log(all / positives);
            for (int64_t j = 0; j < p.keys; ++j) {
                const int64_t other = b * p.keys + j;
                const double* kj = &uk[other * channels];
                const double share = e[j] / all - (positive[j] ? e[j] / positives : 0);
                const double slope = grad[row] * share / p.temperature;
                for (int64_t c = 0; c < channels; ++c)
                    gq[row * channels + c] += slope * kj[c], gk[other * channels + c] += slope * qi[c];
            }
        }
    driver::through_norm(q, gq, channels), driver::through_norm(k, gk, channels);
    Worst worst;
    worst.compare(loss, losses);
    if (to_query) worst.compare(grad_query, gq);
    if (to_key) worst.compare(grad_key, gk);
    return worst.error;
}

}  // namespace

int main(int argc, char** argv) {
    struct Case {
        int64_t batch, queries, keys, channels, axes;
        double radius, temperature;
    };
    std::vector<Case> cases = {
        {2, 1, 1, 1, 1, 0.3, 0.3},   {1, 7, 5, 3, 3, 0.4, 0.3},    {2, 70, 130, 17, 3, 0.2, 0.1},
        {1, 129, 40, 64, 2, 9, 0.5}, {2, 33, 300, 33, 1, 0.01, 1}, {1, 300, 290, 8, 3, 0.1, 0.05},
        {0, 5, 5, 4, 2, 1, 0.3},     {1, 4, 0, 4, 2, 1, 0.3},      {1, 0, 4, 4, 2, 1, 0.3},
    };
    // What is left of a block of queries, keys or channels: every number of them.
    for (int64_t n = 1; n <= 36; ++n) cases.push_back({1, n, 41 - n, n, 3, 0.4, 0.3});
    // Three chunks, with a chunk of a few pixels at the end; as many chunks as there are at most.
    const std::vector<Case> large = {{1, 1100, 1030, 5, 3, 0.1, 0.3},
                                     {2, 530, 520, 3, 2, 0.1, 0.3},
                                     {1, 3, 33000, 2, 1, 0.01, 0.3},
                                     {1, 33000, 2, 2, 1, 0.01, 0.3}};
    const bool races = driver::only_races(argc, argv);
    int checked = 0, failed = 0;
    const auto run = [&](const Case& c, int threads, bool cull, Wanted wanted) {
        if (races && threads == 1) return;
        Problem p{c.batch, c.queries, c.keys, c.channels, c.axes, c.temperature, threads};
        p.cull = cull;
        const double errors[] = {check<float, float>(p, c.radius, wanted), check<double, double>(p, c.radius, wanted),
                                 check<float, double>(p, c.radius, wanted)};
        for (int kind = 0; kind < 3; ++kind, ++checked) {
            if (errors[kind] <= (kind == 1 ? 1e-13 : 3e-6) / c.temperature) continue;
            ++failed;
            std::printf("FAILED error %g, %ld queries, %ld keys, threads %d, cull %d, wanted %d, kind %d\n",
                        errors[kind], static_cast<long>(c.queries), static_cast<long>(c.keys), threads, cull, wanted,
                        kind);
        }
    };
    for (const Case& c : cases)
        for (Wanted wanted : {both, query_alone, key_alone})
            for (int threads : {1, 3}) run(c, threads, wanted != both, wanted);
    for (const Case& c : large) run(c, 3, true, both);
    std::printf("%d checked, %d failed\n", checked, failed);
    return failed != 0;
}
