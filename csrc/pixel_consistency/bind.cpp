// SPDX-License-Identifier: Apache-2.0
// The pixel consistency's CPU kernels for Python.
#include "../common/bindings.h"
#include "pixel_consistency.h"

namespace medaccel {
namespace pixel_consistency {
namespace {

// size: (B, N, M, C, S); dtype of the features and the sums, coords_dtype of coordinates and radius.
void pixel_consistency_forward(std::uintptr_t query, std::uintptr_t key, std::uintptr_t query_coords,
                               std::uintptr_t key_coords, std::uintptr_t radius, std::uintptr_t sums,
                               std::uintptr_t counts, int dtype, int coords_dtype, const Shape& size, int threads) {
    const Problem p{size[0], size[1], size[2], size[3], size[4], threads};
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            forward(address<const T>(query), address<const T>(key), address<const U>(query_coords),
                    address<const U>(key_coords), address<const U>(radius), address<T>(sums), address<T>(counts), p);
        });
    });
}

void pixel_consistency_backward(std::uintptr_t grad, std::uintptr_t query, std::uintptr_t key,
                                std::uintptr_t query_coords, std::uintptr_t key_coords, std::uintptr_t radius,
                                std::uintptr_t grad_query, std::uintptr_t grad_key, int dtype, int coords_dtype,
                                const Shape& size, int threads) {
    const Problem p{size[0], size[1], size[2], size[3], size[4], threads};
    dispatch(dtype, [&](auto zero) {
        dispatch(coords_dtype, [&](auto coords_zero) {
            using T = decltype(zero);
            using U = decltype(coords_zero);
            backward(address<const T>(grad), address<const T>(query), address<const T>(key),
                     address<const U>(query_coords), address<const U>(key_coords), address<const U>(radius),
                     address<T>(grad_query), address<T>(grad_key), p);
        });
    });
}

}  // namespace
}  // namespace pixel_consistency

void bind_pixel_consistency(py::module_& m) {
    m.def("pixel_consistency_forward", &pixel_consistency::pixel_consistency_forward, Release());
    m.def("pixel_consistency_backward", &pixel_consistency::pixel_consistency_backward, Release());
}

}  // namespace medaccel
