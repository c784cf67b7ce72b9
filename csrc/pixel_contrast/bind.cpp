// SPDX-License-Identifier: Apache-2.0
// The pixel contrast's CPU kernels for Python.
#include "../common/bindings.h"
#include "pixel_contrast.h"

namespace medaccel {
namespace pixel_contrast {
namespace {

Problem problem_of(const Shape& size, double temperature, int threads) {
    return {size[0], size[1], size[2], size[3], size[4], temperature, threads};
}

// size: (B, N, M, C, S); dtype of the features and of the loss, coords_dtype of coordinates and radius.
void pixel_contrast_forward(std::uintptr_t query, std::uintptr_t key, std::uintptr_t query_coords,
                            std::uintptr_t key_coords, std::uintptr_t radius, std::uintptr_t loss, std::uintptr_t lse,
                            std::uintptr_t positive_lse, int dtype, int coords_dtype, const Shape& size,
                            double temperature, bool cull, int threads) {
    auto p = problem_of(size, temperature, threads);
    p.cull = cull;
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            forward(address<const T>(query), address<const T>(key), address<const U>(query_coords),
                    address<const U>(key_coords), address<const U>(radius), address<T>(loss), address<T>(lse),
                    address<T>(positive_lse), p);
        });
    });
}

// The addresses of gradients that nobody wants are 0.
void pixel_contrast_backward(std::uintptr_t grad, std::uintptr_t query, std::uintptr_t key,
                             std::uintptr_t query_coords, std::uintptr_t key_coords, std::uintptr_t radius,
                             std::uintptr_t lse, std::uintptr_t positive_lse, std::uintptr_t grad_query,
                             std::uintptr_t grad_key, int dtype, int coords_dtype, const Shape& size,
                             double temperature, int threads) {
    const auto p = problem_of(size, temperature, threads);
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            backward(address<const T>(grad), address<const T>(query), address<const T>(key),
                     address<const U>(query_coords), address<const U>(key_coords), address<const U>(radius),
                     address<const T>(lse), address<const T>(positive_lse), address<T>(grad_query),
                     address<T>(grad_key), p);
        });
    });
}

}  // namespace
}  // namespace pixel_contrast

void bind_pixel_contrast(py::module_& m) {
    m.def("pixel_contrast_forward", &pixel_contrast::pixel_contrast_forward, Release());
    m.def("pixel_contrast_backward", &pixel_contrast::pixel_contrast_backward, Release());
}

}  // namespace medaccel
