// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter's CPU kernels for Python.
#include "../common/bindings.h"
#include "gaussian.h"

namespace medaccel {
namespace gaussian {
namespace {

Settings settings_of(double truncated, int approx, int border, bool normalize, int threads) {
    return {truncated, static_cast<Approx>(approx), static_cast<Border>(border), normalize, threads};
}

bool gaussian_filter(std::uintptr_t in, std::uintptr_t out, int dtype, const Shape& shape, const Shape& in_strides,
                     const Shape& out_strides, const std::vector<double>& sigma, double truncated, int approx,
                     int border, bool normalize, bool adjoint, int threads) {
    const auto settings = settings_of(truncated, approx, border, normalize, threads);
    return dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        return filter(address<const T>(in), address<T>(out), shape, in_strides, out_strides, sigma.data(), adjoint,
                      settings);
    });
}

// An empty result: the layout cannot be served.
std::vector<double> gaussian_sigma_gradient(std::uintptr_t in, std::uintptr_t grad, int dtype, const Shape& shape,
                                            const Shape& in_strides, const Shape& grad_strides,
                                            const std::vector<double>& sigma, double truncated, int approx,
                                            int border, bool normalize, int threads) {
    const auto settings = settings_of(truncated, approx, border, normalize, threads);
    std::vector<double> gradient(sigma.size(), 0.0);
    const bool served = dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        return sigma_gradient(address<const T>(in), address<const T>(grad), shape, in_strides, grad_strides,
                              sigma.data(), gradient.data(), settings);
    });
    return served ? gradient : std::vector<double>{};
}

}  // namespace
}  // namespace gaussian

void bind_gaussian(py::module_& m) {
    m.def("gaussian_filter", &gaussian::gaussian_filter, Release());
    m.def("gaussian_sigma_gradient", &gaussian::gaussian_sigma_gradient, Release());
}

}  // namespace medaccel
