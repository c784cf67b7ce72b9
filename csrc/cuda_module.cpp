// SPDX-License-Identifier: Apache-2.0
// The GPU kernels' Python module, the counterpart of module.cpp: `_cuda`, built by nvcc, and the tests' `_emulated`,
// built by g++ from the same .cu files.
#include "common/bindings.h"
#ifdef MEDACCEL_EMULATED
#include "common/emulation/bindings.h"
#endif

#define EACH_FOLDER(X) \
    X(diffusion_step)  \
    X(gaussian)        \
    X(instance_norm)   \
    X(probe)

namespace medaccel {
#define DECLARE(folder) void bind_##folder##_cuda(py::module_&);
EACH_FOLDER(DECLARE)
}  // namespace medaccel

PYBIND11_MODULE(MEDACCEL_MODULE, m) {
    m.attr("architectures") = MEDACCEL_CUDA_ARCHS;
    m.attr("cuda_version") = MEDACCEL_CUDA_VERSION;
#define BIND(folder) medaccel::bind_##folder##_cuda(m);
    EACH_FOLDER(BIND)
#ifdef MEDACCEL_EMULATED
    medaccel::bind_emulation(m);
#endif
}
