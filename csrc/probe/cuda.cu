// SPDX-License-Identifier: Apache-2.0
#include "probe.h"

#include <stdexcept>

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

void check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("probe: ") + doing + " failed: " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
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
    int before = 0;
    check(cudaGetDevice(&before), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    int* out = nullptr;
    int result = 0;
    cudaError_t status = cudaMalloc(&out, sizeof(int));
    if (status == cudaSuccess) {
        architecture<<<1, 1>>>(out);
        status = cudaGetLastError();
        if (status == cudaSuccess) status = cudaMemcpy(&result, out, sizeof(int), cudaMemcpyDeviceToHost);
        cudaFree(out);
    }
    cudaSetDevice(before);
    check(status, "the kernel");
    return result;
}

}  // namespace medaccel::probe
