// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' Python module: what each op's bind.cpp adds, and the questions that concern no op. It is compiled
// once and linked with each instruction set's kernels.
#include <string>
#include <vector>

#include "common/bindings.h"
#include "common/parallel.h"

#define EACH_OP(X)       \
    X(diffusion_step)    \
    X(gaussian)          \
    X(instance_norm)     \
    X(nt_xent)           \
    X(pixel_consistency) \
    X(pixel_contrast)    \
    X(propagation)       \
    X(window_attention)

namespace medaccel {

const char* isa_name();  // isa.cpp

#define DECLARE(op) void bind_##op(py::module_&);
EACH_OP(DECLARE)

namespace {

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
}  // namespace medaccel

PYBIND11_MODULE(_cpu, m) {
    medaccel::serial_after_fork();
    m.attr("isa") = medaccel::isa_name();
    m.attr("compiler") = MEDACCEL_COMPILER;
    m.def("supported_isas", &medaccel::supported_isas);
#define BIND(op) medaccel::bind_##op(m);
    EACH_OP(BIND)
}
