// SPDX-License-Identifier: Apache-2.0
#include "probe.h"

#include "../common/cuda_portable.h"

namespace medaccel::probe {
namespace {

// Reports what it was compiled for. The smallest kernel there is: if it runs, the others have code too.
__global__ void architecture(int* out) {
#ifdef __CUDA_ARCH__
    *out = __CUDA_ARCH__ / 10;
#else
    *out = 0;
#endif
}

}  // namespace

DeviceCount device_count() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return {count, ""};
    cudaGetLastError();  // it must not surface in a later, innocent call
    return {0, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status)};
}

int running_architecture(int device) {
    const DeviceGuard guard(device);
    int* out = nullptr;
    int result = 0;
    CUDA_CHECK(cudaMalloc(&out, sizeof(int)));
    try {
        LAUNCH(architecture, 1, 1, 0, nullptr, out);
        CUDA_CHECK(cudaMemcpy(&result, out, sizeof(int), cudaMemcpyDeviceToHost));
    } catch (...) {
        cudaFree(out);
        throw;
    }
    CUDA_CHECK(cudaFree(out));
    return result;
}

}  // namespace medaccel::probe
