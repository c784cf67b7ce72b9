// SPDX-License-Identifier: Apache-2.0
// The probe for Python.
#include "../common/bindings.h"
#include "probe.h"

namespace medaccel {

void bind_probe_cuda(py::module_& m) {
    m.def("device_count", [] {
        const auto found = probe::device_count();
        return py::make_tuple(found.count, found.problem);
    });
    m.def("running_architecture", &probe::running_architecture);
}

}  // namespace medaccel
