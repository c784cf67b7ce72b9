// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernels of NT-Xent and InfoNCE over odd numbers of vectors and channels, up to several chunks of them,
// without Python or torch in the process: for the sanitizers, and with registers of any width. Log-sum-exps and
// gradients are compared with plain loops over all pairs.
#include "../../csrc/nt_xent/nt_xent.h"

#include "cpu_driver.h"

using namespace medaccel::nt_xent;
using driver::Buffer;

namespace {

enum Wanted { both, query_alone, key_alone };  // gradients

template <class T>
void check(const Problem& p, Wanted wanted, driver::Verdict& verdict) {
    const int64_t n = p.batch * p.queries, channels = p.channels;
    Buffer<T> query(n * channels), key(p.batch * p.keys * channels), lse(n), grad(n), grad_query(query.n),
        grad_key(key.n);
    query.randomize(1), key.randomize(3), grad.randomize(1);
    if (query.n > 0) std::fill_n(query.get(), channels, T(0));  // a zero vector
    for (int64_t i = 2; i < n; i += 5) grad[i] = 0;             // whose queries are skipped
    T* const to_query = wanted == key_alone ? nullptr : grad_query.get();
    T* const to_key = wanted == query_alone ? nullptr : grad_key.get();
    forward(query.get(), key.get(), lse.get(), p);
    backward(grad.get(), query.get(), key.get(), lse.get(), to_query, to_key, p);

    const auto q = query.doubles(), k = key.doubles();
    const auto uq = driver::unit(q, channels), uk = driver::unit(k, channels);
    std::vector<double> sums(n, 0.0), gq(q.size(), 0.0), gk(k.size(), 0.0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = 0; i < p.queries; ++i) {
            const int64_t row = b * p.queries + i;
            const double* qi = &uq[row * channels];
            std::vector<double> e(p.keys);
            double all = 0;
            for (int64_t j = 0; j < p.keys; ++j) {
                const double s = driver::dot(qi, &uk[(b * p.keys + j) * channels], channels);
                e[j] = p.self >= 0 && j == i + p.self ? 0 : std::exp(s / p.temperature);
                all += e[j];
            }
            sums[row] = std::log2(all);
            for (int64_t j = 0; j < p.keys; ++j) {
                const int64_t other = b * p.keys + j;
                const double slope = grad[row] * e[j] / all / p.temperature;
                for (int64_t c = 0; c < channels; ++c)
                    gq[row * channels + c] += slope * uk[other * channels + c],
                        gk[other * channels + c] += slope * qi[c];
            }
        }
    driver::through_norm(q, gq, channels), driver::through_norm(k, gk, channels);
    const double allowed = (sizeof(T) == 8 ? 1e-13 : 3e-6) / p.temperature;
    verdict.compare("lse", lse, sums, allowed);
    if (to_query) verdict.compare("query", grad_query, gq, allowed);
    if (to_key) verdict.compare("key", grad_key, gk, allowed);
}

}  // namespace

int main(int argc, char** argv) {
    struct Case {
        int64_t batch, queries, keys, channels;
        double temperature;
    };
    std::vector<Case> cases = {{2, 1, 2, 1, 0.3},     {1, 7, 5, 3, 0.3},   {2, 70, 130, 17, 0.1},
                               {1, 129, 40, 64, 0.5}, {2, 33, 300, 33, 1}, {1, 300, 290, 8, 0.05},
                               {0, 5, 5, 4, 0.3},     {1, 0, 4, 4, 0.3}};
    // What is left of a block of queries, keys or channels: every number of them.
    for (int64_t n = 1; n <= 36; ++n) cases.push_back({1, n, 41 - n, n, 0.3});
    // Three chunks, with a chunk of a few vectors at the end; as many chunks as there are at most.
    const std::vector<Case> large = {
        {1, 1100, 1030, 5, 0.3}, {2, 530, 520, 3, 0.3}, {1, 3, 33000, 2, 0.3}, {1, 33000, 2, 2, 0.3}};
    const bool races = driver::only_races(argc, argv);
    driver::Verdict verdict;
    const auto run = [&](const Case& c, int64_t self, int threads, Wanted wanted) {
        if (races && threads == 1) return;
        const Problem p{c.batch, c.queries, c.keys, c.channels, self, c.temperature, threads};
        check<float>(p, wanted, verdict);
        check<double>(p, wanted, verdict);
    };
    for (const Case& c : cases)
        for (int64_t self : {-1, 1})
            for (Wanted wanted : {both, query_alone, key_alone})
                for (int threads : {1, 3}) run(c, self, threads, wanted);
    for (const Case& c : large) run(c, 1, 3, both);
    return verdict.finish();
}
