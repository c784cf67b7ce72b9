// SPDX-License-Identifier: Apache-2.0
// What the ops' bindings (<op>/bind.cpp, <op>/bind_cuda.cpp) share. Tensors arrive as addresses, shapes and strides
// (in elements), which the native.py of each op alone may take.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "shapes.h"

namespace medaccel {

namespace py = pybind11;

// The CPU kernels run for a while, so they let go of the interpreter's lock. A launch on a GPU only queues work, and
// keeps it.
using Release = py::call_guard<py::gil_scoped_release>;

template <class T>
T* address(std::uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

enum class DType : int { float32 = 0, float64 = 1 };

// f(T{}) for the type T that a dtype's code stands for.
template <class F>
auto dispatch(int dtype, const F& f) {
    if (dtype == static_cast<int>(DType::float32)) return f(float{});
    if (dtype == static_cast<int>(DType::float64)) return f(double{});
    throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
}

}  // namespace medaccel
