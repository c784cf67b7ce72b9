// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' Python module, the counterpart of module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "probe/probe.h"

namespace py = pybind11;

PYBIND11_MODULE(MEDACCEL_MODULE, m) {
    m.attr("architectures") = MEDACCEL_CUDA_ARCHS;
    m.attr("cuda_version") = MEDACCEL_CUDA_VERSION;
    m.def("device_count", [] {
        const auto found = medaccel::probe::device_count();
        return py::make_tuple(found.count, found.problem);
    });
    m.def("running_architecture", &medaccel::probe::running_architecture);
}
