// SPDX-License-Identifier: Apache-2.0
// Runs pixel propagation's CPU kernel over odd numbers of pixels and channels, and several groups of pixels, for the
// sanitizers, against plain loops.
#include "../../csrc/propagation/propagation.h"

#include "cpu_driver.h"

using namespace medaccel::propagation;

namespace {

enum Wanted { both, features_alone, values_alone };  // gradients

template <class T>
void check(const Problem& p, Wanted wanted, driver::Verdict& verdict) {
    const int64_t n = p.batch * p.pixels, C = p.channels, D = p.value_channels;
    driver::Buffer<T> features(n * C), values(n * D), grad(n * D), out(n * D), grad_features(n * C),
        grad_values(n * D);
    features.randomize(1), values.randomize(1), grad.randomize(1);
    if (n > 1) std::fill_n(features.get(), C, T(0));  // a zero vector
    forward(features.get(), values.get(), out.get(), p);
    backward(grad.get(), features.get(), values.get(), wanted == values_alone ? nullptr : grad_features.get(),
             wanted == features_alone ? nullptr : grad_values.get(), p);
    const auto x = features.doubles(), u = driver::unit(x, C), v = values.doubles(), g = grad.doubles();
    std::vector<double> y(n * D, 0.0), gx(n * C, 0.0), gv(n * D, 0.0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = b * p.pixels; i < (b + 1) * p.pixels; ++i)
            for (int64_t j = b * p.pixels; j < (b + 1) * p.pixels; ++j) {
                const double s = std::max(0.0, driver::dot(&u[i * C], &u[j * C], C));
                const double weight = std::pow(s, p.power);
                const double slope = s > 0 ? p.power * std::pow(s, p.power - 1) : 0;
                const double flow = slope * driver::dot(g.data() + i * D, v.data() + j * D, D);
                for (int64_t c = 0; c < D; ++c) {
                    y[i * D + c] += weight * v[j * D + c];
                    gv[j * D + c] += weight * g[i * D + c];
                }
                for (int64_t c = 0; c < C; ++c) {
                    gx[i * C + c] += flow * u[j * C + c];
                    gx[j * C + c] += flow * u[i * C + c];
                }
            }
    driver::through_norm(x, gx, C);
    const double allowed = sizeof(T) == 4 ? 1e-5 : 1e-13;
    verdict.compare("output", out, y, allowed);
    if (wanted != features_alone) verdict.compare("values' gradient", grad_values, gv, allowed);
    if (wanted != values_alone) verdict.compare("features' gradient", grad_features, gx, allowed);
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<Problem> cases = {{2, 1, 1, 1, 2, 1},    {1, 7, 3, 5, 2, 1},    {2, 130, 17, 33, 2, 3},
                                  {1, 100, 64, 8, 1, 3}, {1, 70, 9, 64, 3, 1},  {1, 60, 5, 7, 2.5, 3},
                                  {0, 5, 4, 4, 2, 1},    {1, 0, 4, 4, 2, 1},    {1, 40, 4, 0, 2, 1},
                                  {2, 395, 3, 2, 2, 3},  {1, 700, 5, 4, 1.5, 3}};
    // What is left of a tile of pixels or of a block of channels: every number of them.
    for (int64_t n = 1; n <= 36; ++n) cases.push_back({1, n, n, 37 - n, 2, 1});
    const bool races = driver::only_races(argc, argv);
    driver::Verdict verdict;
    for (const Problem& p : cases)
        for (Wanted wanted : {both, features_alone, values_alone})
            if (!races || p.threads > 1) check<float>(p, wanted, verdict), check<double>(p, wanted, verdict);
    return verdict.finish();
}
