// SPDX-License-Identifier: Apache-2.0
// Runs the attention's CPU kernel over odd maps and windows, every head dimension from 1 to 70, and jobs of several
// windows, without Python or torch in the process: for the sanitizers, and with registers of any width. Output and
// gradients are compared with plain loops over all pairs.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/common/philox.h"
#include "../../csrc/window_attention/window_attention.h"
#include "cpu_driver.h"

using namespace medaccel::window_attention;
using driver::Buffer;
using driver::random_value;

namespace {

struct Token {
    int64_t voxel;  // −1: padding
    int region;
};

std::vector<Token> tokens_of(const Problem& p, int64_t window) {
    const Size3 grid = p.grid();
    const Size3 at = {window / (grid[1] * grid[2]), window / grid[2] % grid[1], window % grid[2]};
    std::vector<Token> tokens;
    for (int64_t t = 0; t < p.tokens(); ++t) {
        const Size3 inside = {t / (p.window[1] * p.window[2]), t / p.window[2] % p.window[1], t % p.window[2]};
        Token token{0, 0};
        for (int a = 0; a < 3; ++a) {
            const int64_t padded = grid[a] * p.window[a], rolled = at[a] * p.window[a] + inside[a];
            const int64_t source = (rolled + p.shift[a]) % padded;
            token.region = 2 * token.region + (p.shift[a] > 0 && rolled >= padded - p.shift[a]);
            if (source >= p.sizes[a]) token.voxel = -1;
            if (token.voxel >= 0) token.voxel = token.voxel * p.sizes[a] + source;
        }
        tokens.push_back(token);
    }
    return tokens;
}

// The factor of a weight under dropout.
double kept(const Problem& p, int64_t sample, int64_t window, int64_t head, int64_t query, int64_t key) {
    if (p.dropout_p == 0) return 1;
    const auto words =
        medaccel::philox::random_words(p.dropout_seed, static_cast<uint32_t>(key / 4), static_cast<uint32_t>(query),
                                       static_cast<uint32_t>(window * p.heads + head), static_cast<uint32_t>(sample));
    return words.w[key % 4] < p.dropout_threshold ? 0 : 1 / (1 - p.dropout_p);
}

// With `pad_given`, padding is given and so are the gradients of padding and table wanted.
template <class T>
double check(const Problem& p, bool pad_given, double spread) {
    const int64_t c = p.channels(), n = p.tokens(), d = p.head_dim, voxels = p.sizes[0] * p.sizes[1] * p.sizes[2];
    Buffer<T> qkv(p.batch * voxels * 3 * c), table(p.table_rows * p.heads), pad(3 * c), out(p.batch * voxels * c);
    Buffer<T> grad(out.n), lse(p.batch * p.windows() * p.heads * n), grad_qkv(qkv.n), grad_table(table.n),
        grad_pad(3 * c);
    std::vector<int32_t> index(n * n);
    qkv.randomize(spread), table.randomize(1), pad.randomize(spread), grad.randomize(1);
    for (auto& i : index) i = static_cast<int32_t>((random_value() + 0.5) * p.table_rows);
    const T* pad_pointer = pad_given ? pad.get() : nullptr;
    forward(qkv.get(), table.get(), index.data(), pad_pointer, out.get(), lse.get(), p);
    backward(grad.get(), qkv.get(), table.get(), index.data(), pad_pointer, out.get(), lse.get(), grad_qkv.get(),
             pad_given ? grad_table.get() : nullptr, pad_given ? grad_pad.get() : nullptr, p);

    std::vector<double> o(out.n, 0.0), gq(qkv.n, 0.0), gt(table.n, 0.0), gp(3 * c, 0.0), zeros(3 * c, 0.0);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t w = 0; w < p.windows(); ++w) {
            const auto tokens = tokens_of(p, w);
            const auto value = [&](int64_t t, int part, int64_t h, int64_t k) {
                const int64_t channel = part * c + h * d + k;
                if (tokens[t].voxel >= 0)
                    return static_cast<double>(qkv.get()[(b * voxels + tokens[t].voxel) * 3 * c + channel]);
                return pad_given ? static_cast<double>(pad.get()[channel]) : 0.0;
            };
            const auto add = [&](int64_t t, int part, int64_t h, int64_t k, double g) {
                const int64_t channel = part * c + h * d + k;
                (tokens[t].voxel >= 0 ? gq[(b * voxels + tokens[t].voxel) * 3 * c + channel] : gp[channel]) += g;
            };
            for (int64_t h = 0; h < p.heads; ++h)
                for (int64_t i = 0; i < n; ++i) {
                    if (tokens[i].voxel < 0) continue;
                    const int64_t row = (b * voxels + tokens[i].voxel) * c + h * d;
                    std::vector<double> weight(n), slope(n, 0.0), keep(n);
                    double top = -1e300, sum = 0, delta = 0;
                    for (int64_t j = 0; j < n; ++j) {
                        double s = table.get()[index[i * n + j] * p.heads + h];
                        if (tokens[i].region != tokens[j].region) s -= 100;
                        for (int64_t k = 0; k < d; ++k) s += p.scale * value(i, 0, h, k) * value(j, 1, h, k);
                        weight[j] = s;
                        top = std::max(top, s);
                    }
                    for (double& s : weight) sum += s = std::exp(s - top);
                    for (int64_t j = 0; j < n; ++j) {
                        weight[j] /= sum;
                        keep[j] = kept(p, b, w, h, i, j);
                        for (int64_t k = 0; k < d; ++k) {
                            o[row + k] += keep[j] * weight[j] * value(j, 2, h, k);
                            slope[j] += keep[j] * grad.get()[row + k] * value(j, 2, h, k);
                            add(j, 2, h, k, keep[j] * weight[j] * grad.get()[row + k]);
                        }
                        delta += weight[j] * slope[j];
                    }
                    for (int64_t j = 0; j < n; ++j) {
                        const double ds = weight[j] * (slope[j] - delta);
                        gt[index[i * n + j] * p.heads + h] += ds;
                        for (int64_t k = 0; k < d; ++k) {
                            add(i, 0, h, k, p.scale * ds * value(j, 1, h, k));
                            add(j, 1, h, k, p.scale * ds * value(i, 0, h, k));
                        }
                    }
                }
        }
    double error = 0;
    const auto compare = [&](const Buffer<T>& ours, const std::vector<double>& truth) {
        double largest = 1, worst = 0;
        for (double t : truth) largest = std::max(largest, std::fabs(t));
        for (int64_t i = 0; i < ours.n; ++i) {
            const double e = std::fabs(ours.get()[i] - truth[i]);
            if (!(e <= worst)) worst = e;
        }
        if (!(worst / largest <= error)) error = worst / largest;
    };
    compare(out, o), compare(grad_qkv, gq);
    if (pad_given) compare(grad_table, gt), compare(grad_pad, gp);
    return error;
}

}  // namespace

int main(int argc, char** argv) {
    struct Case {
        Size3 sizes, window, shift;
        int64_t heads, head_dim;
    };
    const std::vector<Case> shapes = {
        {{4, 4, 4}, {4, 4, 4}, {0, 0, 0}, 2, 8},   {{5, 6, 7}, {3, 3, 3}, {1, 1, 1}, 2, 4},
        {{1, 9, 10}, {1, 4, 4}, {0, 2, 2}, 1, 16}, {{1, 1, 11}, {1, 1, 4}, {0, 0, 2}, 3, 5},
        {{5, 9, 6}, {4, 4, 4}, {2, 2, 2}, 1, 12},  {{1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 1, 1},
        {{6, 6, 5}, {5, 6, 5}, {2, 0, 0}, 1, 32},  {{3, 4, 3}, {3, 2, 2}, {0, 1, 1}, 2, 70},
    };
    const std::vector<Case> several_windows_a_job = {
        {{1, 1, 401}, {1, 1, 2}, {0, 0, 1}, 2, 5},
        {{7, 9, 10}, {2, 2, 2}, {1, 1, 1}, 2, 3},
        {{1, 30, 31}, {1, 3, 2}, {0, 0, 0}, 3, 4},
    };
    const bool races = driver::only_races(argc, argv);
    int checked = 0, failed = 0;
    // spread: up to 2 the regions of a cut window are kept apart, from 60 on the mask is added as it stands, and at 8
    // it is the one in some windows and the other in others.
    const auto run = [&](const Case& c, int64_t batch, int threads, bool pad_given, double spread, double dropout) {
        if (races && threads == 1) return;
        Problem p{};
        p.batch = batch, p.sizes = c.sizes, p.window = c.window, p.shift = c.shift;
        p.heads = c.heads, p.head_dim = c.head_dim, p.table_rows = 13;
        p.scale = 1 / std::sqrt(static_cast<double>(c.head_dim)), p.threads = threads;
        p.dropout_p = dropout, p.dropout_threshold = static_cast<uint32_t>(dropout * 4294967296.0);
        p.dropout_seed = 0x0123456789ABCDEFull;
        const double errors[2] = {check<float>(p, pad_given, spread), check<double>(p, pad_given, spread)};
        for (int kind = 0; kind < 2; ++kind, ++checked) {
            const double bound = (kind == 0 ? 1e-5 : 1e-13) * spread;
            if (errors[kind] <= bound) continue;
            ++failed;
            std::printf("FAILED error %g, head_dim %ld, threads %d, pad %d, spread %g, dropout %g, %s\n",
                        errors[kind], static_cast<long>(c.head_dim), threads, pad_given, spread, dropout,
                        kind ? "double" : "float");
        }
    };
    for (const Case& c : shapes)
        for (int variant = 0; variant < 8; ++variant)
            run(c, 2, variant & 1 ? 3 : 1, variant & 2, variant & 4 ? 60 : 2, 0);
    for (const Case& c : several_windows_a_job)
        for (double spread : {2.0, 8.0, 60.0}) run(c, 1, 3, spread < 60, spread, 0);
    for (const std::vector<Case>* cases : {&shapes, &several_windows_a_job})
        for (const Case& c : *cases) run(c, 1, 3, true, 2, 0.3);
    for (int64_t head_dim = 1; head_dim <= 70; ++head_dim)
        for (int64_t heads : {1, 2})
            for (bool cut : {false, true})
                run({{2, 3, 3}, {2, 2, 2}, {0, 1, cut}, heads, head_dim}, 1, 1, cut, cut ? 2 : 60, 0);
    std::printf("%d checked, %d failed\n", checked, failed);
    return failed != 0;
}
