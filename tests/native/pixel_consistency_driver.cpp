// SPDX-License-Identifier: Apache-2.0
// Runs the near pairs' CPU kernel over odd numbers of pixels and channels, and several blocks of pixels, for the
// sanitizers, against plain loops.
#include "../../csrc/pixel_consistency/pixel_consistency.h"

#include "cpu_driver.h"

using namespace medaccel::pixel_consistency;

namespace {

enum Wanted { both, query_alone, key_alone };  // gradients

template <class T, class U>
void check(const Problem& p, double radius_value, Wanted wanted, driver::Verdict& verdict) {
    const int64_t n = p.batch * p.queries, m = p.batch * p.keys, C = p.channels;
    driver::Buffer<T> query(n * C), key(m * C), grad(n), sums(n), counts(n), grad_query(n * C), grad_key(m * C);
    driver::Buffer<U> query_coords(n * p.axes), key_coords(m * p.axes), radius(p.batch);
    query.randomize(1), key.randomize(3), grad.randomize(1), query_coords.randomize(1), key_coords.randomize(1);
    for (int64_t b = 0; b < p.batch; ++b) radius[b] = static_cast<U>(radius_value);
    if (n > 1) std::fill_n(query.get(), C, T(0));  // a zero vector
    if (m > 1) key_coords[0] = std::numeric_limits<U>::quiet_NaN();
    forward(query.get(), key.get(), query_coords.get(), key_coords.get(), radius.get(), sums.get(), counts.get(), p);
    backward(grad.get(), query.get(), key.get(), query_coords.get(), key_coords.get(), radius.get(),
             wanted == key_alone ? nullptr : grad_query.get(), wanted == query_alone ? nullptr : grad_key.get(), p);
    const auto q = query.doubles(), k = key.doubles(), uq = driver::unit(q, C), uk = driver::unit(k, C);
    std::vector<double> sum(n, 0.0), count(n, 0.0), gq(n * C, 0.0), gk(m * C, 0.0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = b * p.queries; i < (b + 1) * p.queries; ++i)
            for (int64_t j = b * p.keys; j < (b + 1) * p.keys; ++j) {
                U squared = 0;
                for (int64_t a = 0; a < p.axes; ++a) {
                    const U d = query_coords[i * p.axes + a] - key_coords[j * p.axes + a];
                    squared += d * d;
                }
                if (!(squared < radius[b] * radius[b])) continue;
                sum[i] += driver::dot(&uq[i * C], &uk[j * C], C);
                count[i] += 1;
                for (int64_t c = 0; c < C; ++c) {
                    gq[i * C + c] += grad[i] * uk[j * C + c];
                    gk[j * C + c] += grad[i] * uq[i * C + c];
                }
            }
    driver::through_norm(q, gq, C), driver::through_norm(k, gk, C);
    const double allowed = sizeof(T) == 4 ? 1e-5 : 1e-13;
    verdict.compare("sums", sums, sum, allowed), verdict.compare("counts", counts, count, 0);
    if (wanted != key_alone) verdict.compare("query's gradient", grad_query, gq, allowed);
    if (wanted != query_alone) verdict.compare("key's gradient", grad_key, gk, allowed);
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<Problem> cases = {{2, 1, 1, 1, 1, 1},     {1, 7, 5, 3, 3, 1},    {2, 70, 130, 17, 3, 3},
                                  {1, 129, 40, 64, 2, 3}, {0, 5, 5, 4, 2, 1},    {1, 4, 0, 4, 2, 1},
                                  {1, 0, 4, 4, 2, 1},     {1, 600, 530, 3, 3, 3}};
    // What is left of a block of pixels or of a register of channels: every number of them.
    for (int64_t n = 1; n <= 36; ++n) cases.push_back({1, 28 + n, 100 - n, n, 1 + n % 3, 1});
    const bool races = driver::only_races(argc, argv);
    driver::Verdict verdict;
    for (const Problem& p : cases)
        for (double radius : {0.05, 0.3, 9.0}) {
            if (races && p.threads == 1) continue;
            check<float, float>(p, radius, both, verdict), check<float, double>(p, radius, query_alone, verdict);
            check<double, double>(p, radius, both, verdict), check<double, float>(p, radius, key_alone, verdict);
        }
    return verdict.finish();
}
