// SPDX-License-Identifier: Apache-2.0
// Runs the Gaussian filter's CPU kernel over odd shapes, borders and layouts without Python or torch in the process:
// for the sanitizers, and for an emulated old processor. Output and sigma's gradient are compared with plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "../../csrc/gaussian/gaussian.h"
#include "cpu_driver.h"

using medaccel::Shape;
using namespace medaccel::gaussian;
using driver::random_value;

namespace {

Shape contiguous_strides(const Shape& shape) {
    Shape strides(shape.size());
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
    return strides;
}

Shape channels_last_strides(const Shape& shape) {
    Shape strides(shape.size());
    strides[1] = 1;
    int64_t step = shape[1];
    for (size_t i = shape.size(); i-- > 2; step *= shape[i]) strides[i] = step;
    strides[0] = step;
    return strides;
}

// One axis of the plain filter, of its transpose or of its derivative by sigma, on a contiguous tensor.
std::vector<double> along(const std::vector<double>& x, const Shape& shape, size_t axis, double sigma, bool adjoint,
                          const Settings& s, bool derivative = false) {
    const int r = radius_of(sigma, s.truncated);
    std::vector<double> taps(2 * r + 1), slopes(2 * r + 1), work(r + 2), y(x.size(), 0.0);
    fill_taps(sigma, r, s.approx, s.normalize, taps.data(), slopes.data(), work.data());
    if (derivative) taps = slopes;
    const int64_t step = contiguous_strides(shape)[axis], size = shape[axis];
    for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
        const int64_t at = i / step % size, base = i - at * step;
        for (int k = -r; k <= r; ++k) {
            const int64_t source = border_source(at + k, size, s.border);
            if (source < 0) continue;
            if (adjoint)
                y[base + source * step] += taps[k + r] * x[i];
            else
                y[i] += taps[k + r] * x[base + source * step];
        }
    }
    return y;
}

template <class T>
bool check(const Shape& shape, const std::vector<double>& sigma, Border border, Approx approx, bool channels_last,
           bool adjoint, int threads, bool normalize = false) {
    const Settings settings{4.0, approx, border, normalize, threads};
    const int64_t n = medaccel::element_count(shape);
    const Shape plain = contiguous_strides(shape), strides = channels_last ? channels_last_strides(shape) : plain;
    // Exactly as many elements as the tensor has: a sanitizer then sees the first one too many.
    std::unique_ptr<T[]> in(new T[n]), out(new T[n]);
    std::vector<double> truth(n), input(n);
    std::vector<int64_t> place(n);
    for (int64_t i = 0; i < n; ++i) {
        int64_t at = 0;
        for (size_t d = 0; d < shape.size(); ++d) at += i / plain[d] % shape[d] * strides[d];
        place[i] = at;
        input[i] = truth[i] = in[at] = static_cast<T>(random_value());
        out[at] = std::numeric_limits<T>::quiet_NaN();
    }
    if (!filter(in.get(), out.get(), shape, strides, strides, sigma.data(), adjoint, settings)) {
        std::printf("refused a dense layout\n");
        return false;
    }
    for (size_t a = 0; a < sigma.size(); ++a) truth = along(truth, shape, a + 2, sigma[a], adjoint, settings);
    double error = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double e = std::fabs(static_cast<double>(out[place[i]]) - truth[i]);
        if (!(e <= error)) error = e;
    }
    // By sigma: the output serves as the incoming gradient. Errors are relative to the lengths of what is multiplied.
    std::vector<double> gradient(sigma.size(), std::nan(""));
    sigma_gradient(in.get(), out.get(), shape, strides, strides, sigma.data(), gradient.data(), settings);
    double gradient_error = 0;
    for (size_t by = 0; by < sigma.size() && !adjoint; ++by) {
        std::vector<double> slope = input;
        for (size_t a = 0; a < sigma.size(); ++a)
            slope = along(slope, shape, a + 2, sigma[a], false, settings, a == by);
        double sum = 0, square = 0, out_square = 0, in_square = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double g = out[place[i]];
            sum += slope[i] * g, square += slope[i] * slope[i], out_square += g * g, in_square += input[i] * input[i];
        }
        const double scale = std::sqrt(std::max(square, in_square) * out_square);
        const double e = std::fabs(gradient[by] - sum) / std::max(1e-30, scale);
        if (!(e <= gradient_error)) gradient_error = e;
    }
    const double bound = sizeof(T) == 4 ? 2e-6 : 1e-14;
    if (error <= bound && gradient_error <= bound) return true;
    std::printf("FAILED error %g, of sigma's gradient %g, shape", error, gradient_error);
    for (int64_t s : shape) std::printf(" %ld", static_cast<long>(s));
    std::printf(" border %d approx %d channels_last %d adjoint %d threads %d\n", static_cast<int>(border),
                static_cast<int>(approx), channels_last, adjoint, threads);
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::pair<Shape, std::vector<double>>> cases = {
        {{2, 3, 37}, {1.3}},
        {{1, 1, 1300}, {3.0}},
        {{2, 2, 19, 26}, {0.8, 2.0}},
        {{1, 1, 3, 1100}, {1.0, 2.5}},
        {{1, 2, 11, 14, 17}, {1.0, 2.0, 0.6}},
        {{2, 3, 9, 10, 33}, {1.5, 1.0, 2.0}},
        {{1, 1, 1, 9, 1}, {2.0, 2.0, 2.0}},
        {{1, 2, 5, 6, 7}, {4.0, 9.0, 6.0}},
        {{1, 1, 6, 7, 8}, {0.0, 1.0, 0.0}},
        {{1, 1, 6, 7, 8}, {1.0, 0.0, 0.0}},
        {{0, 1, 6, 7, 8}, {1.0, 1.0, 1.0}},
        {{1, 1, 6, 0, 8}, {1.0, 1.0, 1.0}},
    };
    // Blocks along z, tiles along x and whole volumes as the jobs of several threads, and what is left of each.
    const std::vector<std::pair<Shape, std::vector<double>>> large = {
        {{1, 1, 21, 9, 40}, {1.5, 1.0, 2.0}},
        {{1, 1, 2, 4, 1703}, {0.7, 1.0, 1.0}},
        {{2, 2, 9, 11, 31}, {1.0, 0.0, 2.0}},
        {{1, 3, 18, 301}, {1.5, 2.5}},
        {{2, 1, 9000}, {4.0}},
    };
    const bool races = driver::only_races(argc, argv);
    int checked = 0, failed = 0;
    const auto run = [&](const Shape& shape, const std::vector<double>& sigma, Border border, Approx approx,
                         bool last, bool adjoint, int threads, bool normalize = false) {
        if (races && threads == 1) return;
        failed += !check<float>(shape, sigma, border, approx, last, adjoint, threads, normalize);
        failed += !check<double>(shape, sigma, border, approx, last, adjoint, threads, normalize);
        checked += 2;
    };
    for (const auto& [shape, sigma] : cases)
        for (int border = 0; border < 5 && !races; ++border)  // too small for more than one thread
            for (int approx = 0; approx < 3; ++approx)
                for (int variant = 0; variant < 8; ++variant)
                    run(shape, sigma, static_cast<Border>(border), static_cast<Approx>(approx), variant & 1,
                        variant & 2, variant & 4 ? 3 : 1);
    for (const auto& [shape, sigma] : large)
        for (int variant = 0; variant < 5; ++variant)
            run(shape, sigma, static_cast<Border>(variant), Approx::erf, variant & 1, variant & 2, 3, variant > 2);
    // What is left of a register, a block of rows or a block of planes: every number of them, and every radius.
    for (int n = 1; n <= 40; ++n)
        for (Border border : {Border::constant, Border::reflect, Border::wrap})
            run({1, 1, 1 + n % 9, 1 + n % 5, n}, {0.3, 0.6, n * 0.25}, border, Approx::sampled, false, n % 2, 1);
    std::printf("%d checked, %d failed\n", checked, failed);
    return failed != 0;
}
