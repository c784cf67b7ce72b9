// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' Python module; the only file that knows Python, beside cuda_module.cpp. It is compiled
// once and linked with each instruction set's kernels. Tensors arrive as addresses, shapes and strides (in
// elements), which medaccel/_native/ alone may take.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "diffusion_step/arguments.h"
#include "gaussian/gaussian.h"
#include "instance_norm/instance_norm.h"
#include "pixel_consistency/pixel_consistency.h"
#include "pixel_contrast/pixel_contrast.h"
#include "propagation/propagation.h"
#include "window_attention/window_attention.h"

namespace py = pybind11;
using medaccel::Shape;

namespace medaccel {
const char* isa_name();  // isa.cpp
}

namespace {

enum class DType : int { float32 = 0, float64 = 1 };

template <class F>
auto dispatch(int dtype, const F& f) {
    if (dtype == static_cast<int>(DType::float32)) return f(float{});
    if (dtype == static_cast<int>(DType::float64)) return f(double{});
    throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
}

medaccel::gaussian::Settings gaussian_settings(double truncated, int approx, int border, bool normalize,
                                               int threads) {
    using namespace medaccel::gaussian;
    return {truncated, static_cast<Approx>(approx), static_cast<Border>(border), normalize, threads};
}

bool gaussian_filter(std::uintptr_t in, std::uintptr_t out, int dtype, const Shape& shape, const Shape& in_strides,
                     const Shape& out_strides, const std::vector<double>& sigma, double truncated, int approx,
                     int border, bool normalize, bool adjoint, int threads) {
    const auto settings = gaussian_settings(truncated, approx, border, normalize, threads);
    return dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        return medaccel::gaussian::filter(reinterpret_cast<const T*>(in), reinterpret_cast<T*>(out), shape,
                                          in_strides, out_strides, sigma.data(), adjoint, settings);
    });
}

// An empty result: the layout cannot be served.
std::vector<double> gaussian_sigma_gradient(std::uintptr_t in, std::uintptr_t grad, int dtype, const Shape& shape,
                                            const Shape& in_strides, const Shape& grad_strides,
                                            const std::vector<double>& sigma, double truncated, int approx,
                                            int border, bool normalize, int threads) {
    const auto settings = gaussian_settings(truncated, approx, border, normalize, threads);
    std::vector<double> gradient(sigma.size(), 0.0);
    const bool served = dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        return medaccel::gaussian::sigma_gradient(reinterpret_cast<const T*>(in), reinterpret_cast<const T*>(grad),
                                                  shape, in_strides, grad_strides, sigma.data(), gradient.data(),
                                                  settings);
    });
    return served ? gradient : std::vector<double>{};
}

medaccel::window_attention::Problem window_problem(const Shape& size, int64_t heads, int64_t table_rows,
                                                   const Shape& window, const Shape& shift, double scale,
                                                   double dropout_p, uint32_t dropout_threshold,
                                                   std::uintptr_t dropout_seed, int threads) {
    medaccel::window_attention::Problem p{};
    p.batch = size[0];
    for (int axis = 0; axis < 3; ++axis)
        p.sizes[axis] = size[1 + axis], p.window[axis] = window[axis], p.shift[axis] = shift[axis];
    p.heads = heads;
    p.head_dim = size[4] / (3 * heads);
    p.table_rows = table_rows;
    p.scale = scale;
    p.dropout_p = dropout_p;
    p.dropout_threshold = dropout_threshold;
    if (dropout_seed) p.dropout_seed = static_cast<uint64_t>(*reinterpret_cast<const int64_t*>(dropout_seed));
    p.threads = threads;
    return p;
}

// size: (B, z, y, x, 3·C); dropout_seed: the address of an int64, or 0. Other addresses may be 0 where
// window_attention.h allows null.
void window_attention_forward(std::uintptr_t qkv, std::uintptr_t table, std::uintptr_t index, std::uintptr_t pad,
                              std::uintptr_t out, std::uintptr_t lse, int dtype, const Shape& size, int64_t heads,
                              int64_t table_rows, const Shape& window, const Shape& shift, double scale,
                              double dropout_p, uint32_t dropout_threshold, std::uintptr_t dropout_seed,
                              int threads) {
    const auto p = window_problem(size, heads, table_rows, window, shift, scale, dropout_p, dropout_threshold,
                                  dropout_seed, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::window_attention::forward(reinterpret_cast<const T*>(qkv), reinterpret_cast<const T*>(table),
                                            reinterpret_cast<const int32_t*>(index), reinterpret_cast<const T*>(pad),
                                            reinterpret_cast<T*>(out), reinterpret_cast<T*>(lse), p);
    });
}

void window_attention_backward(std::uintptr_t grad, std::uintptr_t qkv, std::uintptr_t table, std::uintptr_t index,
                               std::uintptr_t pad, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t grad_qkv,
                               std::uintptr_t grad_table, std::uintptr_t grad_pad, int dtype, const Shape& size,
                               int64_t heads, int64_t table_rows, const Shape& window, const Shape& shift,
                               double scale, double dropout_p, uint32_t dropout_threshold,
                               std::uintptr_t dropout_seed, int threads) {
    const auto p = window_problem(size, heads, table_rows, window, shift, scale, dropout_p, dropout_threshold,
                                  dropout_seed, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::window_attention::backward(
            reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(qkv), reinterpret_cast<const T*>(table),
            reinterpret_cast<const int32_t*>(index), reinterpret_cast<const T*>(pad), reinterpret_cast<const T*>(out),
            reinterpret_cast<const T*>(lse), reinterpret_cast<T*>(grad_qkv), reinterpret_cast<T*>(grad_table),
            reinterpret_cast<T*>(grad_pad), p);
    });
}

medaccel::instance_norm::Problem norm_problem(int64_t batch, int64_t channels, int64_t voxels, bool channels_last,
                                              double eps, bool activate, double negative_slope, int threads) {
    return {batch, channels, voxels, channels_last, eps, activate, negative_slope, threads};
}

// Addresses may be 0 where instance_norm.h allows null.
void instance_norm_forward(std::uintptr_t in, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                           std::uintptr_t out, std::uintptr_t mean, std::uintptr_t rstd, int dtype, int64_t batch,
                           int64_t channels, int64_t voxels, bool channels_last, double eps, bool activate,
                           double negative_slope, int threads) {
    const auto p = norm_problem(batch, channels, voxels, channels_last, eps, activate, negative_slope, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::instance_norm::forward(reinterpret_cast<const T*>(in), reinterpret_cast<const T*>(weight),
                                         reinterpret_cast<const T*>(bias), reinterpret_cast<const T*>(residual),
                                         reinterpret_cast<T*>(out), reinterpret_cast<T*>(mean),
                                         reinterpret_cast<T*>(rstd), p);
    });
}

void instance_norm_backward(std::uintptr_t grad, std::uintptr_t in, std::uintptr_t weight, std::uintptr_t bias,
                            std::uintptr_t signs, int sign, std::uintptr_t mean, std::uintptr_t rstd,
                            std::uintptr_t grad_in, std::uintptr_t grad_weight, std::uintptr_t grad_bias,
                            std::uintptr_t grad_residual, int dtype, int64_t batch, int64_t channels, int64_t voxels,
                            bool channels_last, double eps, bool activate, double negative_slope, int threads) {
    const auto p = norm_problem(batch, channels, voxels, channels_last, eps, activate, negative_slope, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::instance_norm::backward(
            reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(in), reinterpret_cast<const T*>(weight),
            reinterpret_cast<const T*>(bias), reinterpret_cast<const T*>(signs),
            static_cast<medaccel::instance_norm::Sign>(sign), reinterpret_cast<const T*>(mean),
            reinterpret_cast<const T*>(rstd), reinterpret_cast<T*>(grad_in), reinterpret_cast<T*>(grad_weight),
            reinterpret_cast<T*>(grad_bias), reinterpret_cast<T*>(grad_residual), p);
    });
}

// coefficients: [kCoefficients][batch or 1].
void diffusion_step_forward(const std::vector<medaccel::diffusion_step::InputNumbers>& in,
                            const std::vector<medaccel::diffusion_step::OutputNumbers>& out, int64_t batch,
                            int64_t size, const std::vector<double>& coefficients,
                            const medaccel::diffusion_step::Clip& clip,
                            const std::tuple<uint64_t, uint64_t, uint32_t>& noise, int threads) {
    using namespace medaccel::diffusion_step;
    const auto columns = static_cast<int64_t>(coefficients.size()) / kCoefficients;
    forward(problem_of(batch, size, coefficients.data(), columns, clip, threads), forward_of(in, out),
            noise_of(noise));
}

void diffusion_step_backward(const std::vector<medaccel::diffusion_step::InputNumbers>& in,
                             const std::vector<medaccel::diffusion_step::OutputNumbers>& out, int64_t batch,
                             int64_t size, const std::vector<double>& coefficients,
                             const medaccel::diffusion_step::Clip& clip, int threads) {
    using namespace medaccel::diffusion_step;
    const auto columns = static_cast<int64_t>(coefficients.size()) / kCoefficients;
    backward(problem_of(batch, size, coefficients.data(), columns, clip, threads), backward_of(in, out));
}

medaccel::pixel_contrast::Problem contrast_problem(const Shape& size, double temperature, int threads) {
    return {size[0], size[1], size[2], size[3], size[4], temperature, threads};
}

// size: (B, N, M, C, S); dtype of the features and of the loss, coords_dtype of coordinates and radius.
void pixel_contrast_forward(std::uintptr_t query, std::uintptr_t key, std::uintptr_t query_coords,
                            std::uintptr_t key_coords, std::uintptr_t radius, std::uintptr_t loss, std::uintptr_t lse,
                            std::uintptr_t positive_lse, int dtype, int coords_dtype, const Shape& size,
                            double temperature, bool cull, int threads) {
    auto p = contrast_problem(size, temperature, threads);
    p.cull = cull;
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            medaccel::pixel_contrast::forward(reinterpret_cast<const T*>(query), reinterpret_cast<const T*>(key),
                                              reinterpret_cast<const U*>(query_coords),
                                              reinterpret_cast<const U*>(key_coords),
                                              reinterpret_cast<const U*>(radius), reinterpret_cast<T*>(loss),
                                              reinterpret_cast<T*>(lse), reinterpret_cast<T*>(positive_lse), p);
        });
    });
}

// The addresses of gradients that nobody wants are 0.
void pixel_contrast_backward(std::uintptr_t grad, std::uintptr_t query, std::uintptr_t key,
                             std::uintptr_t query_coords, std::uintptr_t key_coords, std::uintptr_t radius,
                             std::uintptr_t lse, std::uintptr_t positive_lse, std::uintptr_t grad_query,
                             std::uintptr_t grad_key, int dtype, int coords_dtype, const Shape& size,
                             double temperature, int threads) {
    const auto p = contrast_problem(size, temperature, threads);
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            medaccel::pixel_contrast::backward(
                reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(query), reinterpret_cast<const T*>(key),
                reinterpret_cast<const U*>(query_coords), reinterpret_cast<const U*>(key_coords),
                reinterpret_cast<const U*>(radius), reinterpret_cast<const T*>(lse),
                reinterpret_cast<const T*>(positive_lse), reinterpret_cast<T*>(grad_query),
                reinterpret_cast<T*>(grad_key), p);
        });
    });
}

// size as above; S is not read. self: see pixel_contrast.h.
void similarity_lse_forward(std::uintptr_t query, std::uintptr_t key, std::uintptr_t lse, int dtype,
                            const Shape& size, int64_t self, double temperature, int threads) {
    const auto p = contrast_problem(size, temperature, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::pixel_contrast::lse_forward(reinterpret_cast<const T*>(query), reinterpret_cast<const T*>(key),
                                              self, reinterpret_cast<T*>(lse), p);
    });
}

void similarity_lse_backward(std::uintptr_t grad, std::uintptr_t query, std::uintptr_t key, std::uintptr_t lse,
                             std::uintptr_t grad_query, std::uintptr_t grad_key, int dtype, const Shape& size,
                             int64_t self, double temperature, int threads) {
    const auto p = contrast_problem(size, temperature, threads);
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::pixel_contrast::lse_backward(reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(query),
                                               reinterpret_cast<const T*>(key), self, reinterpret_cast<const T*>(lse),
                                               reinterpret_cast<T*>(grad_query), reinterpret_cast<T*>(grad_key), p);
    });
}

// size, dtype and coords_dtype: as for the pixel contrast.
void pixel_consistency_forward(std::uintptr_t query, std::uintptr_t key, std::uintptr_t query_coords,
                               std::uintptr_t key_coords, std::uintptr_t radius, std::uintptr_t sums,
                               std::uintptr_t counts, int dtype, int coords_dtype, const Shape& size, int threads) {
    const medaccel::pixel_consistency::Problem p{size[0], size[1], size[2], size[3], size[4], threads};
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            medaccel::pixel_consistency::forward(
                reinterpret_cast<const T*>(query), reinterpret_cast<const T*>(key),
                reinterpret_cast<const U*>(query_coords), reinterpret_cast<const U*>(key_coords),
                reinterpret_cast<const U*>(radius), reinterpret_cast<T*>(sums), reinterpret_cast<T*>(counts), p);
        });
    });
}

void pixel_consistency_backward(std::uintptr_t grad, std::uintptr_t query, std::uintptr_t key,
                                std::uintptr_t query_coords, std::uintptr_t key_coords, std::uintptr_t radius,
                                std::uintptr_t grad_query, std::uintptr_t grad_key, int dtype, int coords_dtype,
                                const Shape& size, int threads) {
    const medaccel::pixel_consistency::Problem p{size[0], size[1], size[2], size[3], size[4], threads};
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            medaccel::pixel_consistency::backward(
                reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(query), reinterpret_cast<const T*>(key),
                reinterpret_cast<const U*>(query_coords), reinterpret_cast<const U*>(key_coords),
                reinterpret_cast<const U*>(radius), reinterpret_cast<T*>(grad_query), reinterpret_cast<T*>(grad_key),
                p);
        });
    });
}

// size: (B, N, C, D)
void pixel_propagation_forward(std::uintptr_t features, std::uintptr_t values, std::uintptr_t out, int dtype,
                               const Shape& size, double power, int threads) {
    const medaccel::propagation::Problem p{size[0], size[1], size[2], size[3], power, threads};
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::propagation::forward(reinterpret_cast<const T*>(features), reinterpret_cast<const T*>(values),
                                       reinterpret_cast<T*>(out), p);
    });
}

void pixel_propagation_backward(std::uintptr_t grad, std::uintptr_t features, std::uintptr_t values,
                                std::uintptr_t grad_features, std::uintptr_t grad_values, int dtype,
                                const Shape& size, double power, int threads) {
    const medaccel::propagation::Problem p{size[0], size[1], size[2], size[3], power, threads};
    dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        medaccel::propagation::backward(reinterpret_cast<const T*>(grad), reinterpret_cast<const T*>(features),
                                        reinterpret_cast<const T*>(values), reinterpret_cast<T*>(grad_features),
                                        reinterpret_cast<T*>(grad_values), p);
    });
}

// What this processor and its operating system can run, slowest first. This file is compiled without any -m
// flag, so asking is safe on every processor.
std::vector<std::string> supported_isas() {
    std::vector<std::string> isas{"baseline"};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isas.push_back("avx2");
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            isas.push_back("avx512");
    }
#endif
    return isas;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    medaccel::serial_after_fork();
    m.attr("isa") = medaccel::isa_name();
    m.attr("compiler") = MEDACCEL_COMPILER;
    m.def("supported_isas", &supported_isas);
    using Release = py::call_guard<py::gil_scoped_release>;
    m.def("gaussian_filter", &gaussian_filter, Release());
    m.def("gaussian_sigma_gradient", &gaussian_sigma_gradient, Release());
    m.def("instance_norm_forward", &instance_norm_forward, Release());
    m.def("instance_norm_backward", &instance_norm_backward, Release());
    m.def("pixel_contrast_forward", &pixel_contrast_forward, Release());
    m.def("pixel_contrast_backward", &pixel_contrast_backward, Release());
    m.def("pixel_consistency_forward", &pixel_consistency_forward, Release());
    m.def("pixel_consistency_backward", &pixel_consistency_backward, Release());
    m.def("pixel_propagation_forward", &pixel_propagation_forward, Release());
    m.def("pixel_propagation_backward", &pixel_propagation_backward, Release());
    m.def("similarity_lse_forward", &similarity_lse_forward, Release());
    m.def("similarity_lse_backward", &similarity_lse_backward, Release());
    m.def("window_attention_forward", &window_attention_forward, Release());
    m.def("window_attention_backward", &window_attention_backward, Release());
    m.def("diffusion_step_forward", &diffusion_step_forward, Release());
    m.def("diffusion_step_backward", &diffusion_step_backward, Release());
}
