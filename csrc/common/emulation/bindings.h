// SPDX-License-Identifier: Apache-2.0
// What the tests' emulated module has beyond the real one's functions.
#pragma once

#include "../bindings.h"
#include "harness.h"

namespace medaccel {

inline void bind_emulation(py::module_& m) {
    m.def("reset", &emulation::reset);
    m.def("set_device_count", &emulation::set_device_count);
    m.def("adopt", [](std::uintptr_t begin, std::size_t bytes, int device) {
        emulation::adopt_memory(address<void>(begin), bytes, device);
    });
    m.def("disown", [](std::uintptr_t begin) { emulation::disown_memory(address<void>(begin)); });
    m.def("inject_earlier_error", [] { emulation::inject_earlier_error(cudaErrorIllegalAddress); });
    m.def("fail_next_launch", [] { emulation::fail_next_launch(cudaErrorInvalidConfiguration); });
    m.def("synchronizations", &emulation::synchronizations);
    m.def("launches", [] {
        py::list all;
        for (const auto& launch : emulation::take_launches())
            all.append(py::make_tuple(launch.kernel, launch.device, launch.grid.x * launch.grid.y * launch.grid.z));
        return all;
    });
}

}  // namespace medaccel
