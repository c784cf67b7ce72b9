// SPDX-License-Identifier: Apache-2.0
#include "probe.h"

#include "../common/cuda_portable.h"

namespace medaccel::probe {
namespace {

// The smallest kernel there is: if there is code of it for a device, there is of the others.
__global__ void nothing() {}

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
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, nothing));
    return attributes.ptxVersion;
}

}  // namespace medaccel::probe
