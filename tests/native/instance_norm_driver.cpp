// SPDX-License-Identifier: Apache-2.0
// Runs the norm's CPU kernel over odd shapes, both layouts and several chunks without Python or torch in the process:
// for the sanitizers, and with registers of any width. Output and gradients are compared with plain loops in double.
#include <cmath>
#include <vector>

#include "../../csrc/instance_norm/instance_norm.h"
#include "cpu_driver.h"

using namespace medaccel::instance_norm;
using driver::Buffer;

namespace {

template <class T>
void check(const Problem& p, bool affine, bool residual, bool to_parameters, driver::Verdict& verdict) {
    const int64_t n = p.batch * p.channels * p.voxels, rows = p.batch * p.channels;
    Buffer<T> x(n), g(n), added(n), weight(p.channels), bias(p.channels);
    for (Buffer<T>* input : {&x, &g, &added, &weight, &bias}) input->randomize(1);
    Buffer<T> y(n), mean(rows), rstd(rows), gx(n), gw(p.channels), gb(p.channels), gr(n);
    const T *w = affine ? weight.get() : nullptr, *b = affine ? bias.get() : nullptr;
    const T* r = residual ? added.get() : nullptr;
    forward(x.get(), w, b, r, y.get(), mean.get(), rstd.get(), p);
    const bool positive = p.negative_slope >= 0;
    const Sign sign = !residual ? Sign::recompute : positive ? Sign::from_output : Sign::with_residual;
    const T* signs = !residual ? nullptr : positive ? y.get() : r;
    backward(g.get(), x.get(), w, b, signs, sign, mean.get(), rstd.get(), gx.get(),
             to_parameters ? gw.get() : nullptr, to_parameters ? gb.get() : nullptr,
             residual && to_parameters ? gr.get() : nullptr, p);

    std::vector<double> ty(n), tx(n), tr(n), tw(p.channels, 0.0), tb(p.channels, 0.0);
    const double slope = p.activate ? p.negative_slope : 1;
    for (int64_t s = 0; s < p.batch; ++s)
        for (int64_t c = 0; c < p.channels; ++c) {
            const auto at = [&](int64_t v) {
                return p.channels_last ? (s * p.voxels + v) * p.channels + c : (s * p.channels + c) * p.voxels + v;
            };
            double m = 0, square = 0, sum = 0, product = 0;
            for (int64_t v = 0; v < p.voxels; ++v) m += x[at(v)] / static_cast<double>(p.voxels);
            for (int64_t v = 0; v < p.voxels; ++v) square += (x[at(v)] - m) * (x[at(v)] - m) / p.voxels;
            const double inverse = 1 / std::sqrt(square + p.eps), scale = affine ? weight[c] : 1.0;
            for (int64_t v = 0; v < p.voxels; ++v) {
                const double normal = (x[at(v)] - m) * inverse;
                const double before = normal * scale + (affine ? bias[c] : 0.0) + (residual ? added[at(v)] : 0.0);
                ty[at(v)] = before > 0 ? before : slope * before;
                tr[at(v)] = g[at(v)] * (before > 0 ? 1 : slope);
                sum += tr[at(v)], product += tr[at(v)] * normal;
            }
            tb[c] += sum, tw[c] += product;
            for (int64_t v = 0; v < p.voxels; ++v) {
                const double normal = (x[at(v)] - m) * inverse;
                tx[at(v)] = scale * inverse * (tr[at(v)] - sum / p.voxels - normal * product / p.voxels);
            }
        }
    const double allowed = sizeof(T) == 4 ? 2e-5 : 1e-12;
    verdict.compare("output", y, ty, allowed), verdict.compare("input's gradient", gx, tx, allowed);
    if (!to_parameters) return;
    verdict.compare("weight's gradient", gw, tw, allowed), verdict.compare("bias' gradient", gb, tb, allowed);
    if (residual) verdict.compare("residual's gradient", gr, tr, allowed);
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t shapes[][3] = {{2, 3, 5},  {1, 1, 2},  {2, 7, 90},   {1, 24, 700},
                                 {3, 70, 3}, {2, 5, 64}, {1, 2, 9000}, {1, 13, 1001}};
    // Below 32 768 elements the norm is one thread's.
    const int64_t large[][3] = {{2, 3, 9001}, {1, 17, 4099}, {1, 1, 70001}, {9, 2, 2001}};
    const bool races = driver::only_races(argc, argv);
    driver::Verdict verdict;
    const auto run = [&](const int64_t (&shape)[3], int variant, int threads, bool activate, bool to_parameters) {
        if (races && threads == 1) return;
        Problem p{};
        p.batch = shape[0], p.channels = shape[1], p.voxels = shape[2];
        p.channels_last = variant & 1, p.eps = 1e-5, p.threads = threads;
        p.activate = activate, p.negative_slope = variant & 2 ? -0.4 : 0.1;
        const bool affine = variant & 4, residual = variant & 8;
        check<float>(p, affine, residual, to_parameters, verdict);
        check<double>(p, affine, residual, to_parameters, verdict);
    };
    for (const auto& shape : shapes)
        for (int variant = 0; variant < 16; ++variant) run(shape, variant, 1, true, true);
    for (const auto& shape : large)
        for (int variant = 0; variant < 16; ++variant) run(shape, variant, 3, true, true);
    for (const auto& shape : shapes)
        for (int variant = 0; variant < 16; ++variant) run(shape, variant, 1, variant % 3 == 0, variant % 3 == 1);
    // What is left of a register or a row of them: every number of channels and voxels.
    for (int64_t n = 1; n <= 70; ++n)
        for (int variant = 0; variant < 16; variant += 5) run({1, n, 73 - n}, variant, 1, true, true);
    return verdict.finish();
}
