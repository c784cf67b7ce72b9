// SPDX-License-Identifier: Apache-2.0
// The emulator within a Python module: what medaccel._emulated relies on, on the smallest kernels.
#include <pybind11/pybind11.h>

#include <string>

#include "common/cuda_portable.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

// Each thread takes the next ticket: its place in the order of execution.
__global__ void take_tickets(int* counter, int* ticket) {
    ticket[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

__global__ void diverge(int* out) {
    if (threadIdx.x < 5) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

int* as_int(std::uintptr_t address) { return reinterpret_cast<int*>(address); }

}  // namespace

PYBIND11_MODULE(emulator_module, m) {
    m.def("take_tickets", [](std::uintptr_t counter, std::uintptr_t ticket, int blocks, int threads) {
        LAUNCH(take_tickets, blocks, threads, 0, nullptr, as_int(counter), as_int(ticket));
    });
    m.def("diverge", [](std::uintptr_t out) { LAUNCH(diverge, 1, 64, 0, nullptr, as_int(out)); });
    m.def("launch_too_many_threads", [](std::uintptr_t out) { LAUNCH(diverge, 1, 2000, 0, nullptr, as_int(out)); });
    m.def("device_code_on_the_host", [] { return threadIdx.x; });
    m.def(
        "scan",
        [](std::uintptr_t in, std::uintptr_t out, int n) { kernels::scan(as_int(in), as_int(out), n, 64, nullptr); },
        py::call_guard<py::gil_scoped_release>());
    m.def("to_half", [](std::uintptr_t in, std::uintptr_t half, int n, bool bfloat16) {
        kernels::to_half(reinterpret_cast<const float*>(in), reinterpret_cast<std::uint16_t*>(half), n, bfloat16,
                         nullptr);
    });
    m.def("from_half", [](std::uintptr_t half, std::uintptr_t out, int n, bool bfloat16) {
        kernels::from_half(reinterpret_cast<const std::uint16_t*>(half), reinterpret_cast<float*>(out), n, bfloat16,
                           nullptr);
    });
}
