// SPDX-License-Identifier: Apache-2.0
// Asks the GPU itself whether this build has code for it; `medaccel doctor` and dispatch rely on the answer.
#pragma once

#include <string>

namespace medaccel::probe {

struct DeviceCount {
    int count;            // 0 where there is no usable driver
    std::string problem;  // empty, or what the CUDA runtime says
};

DeviceCount device_count();

// The architecture, as 10·major + minor, of the code that runs on `device`: 90 for sm_90 itself, less where PTX of
// an older one was compiled by the driver. Throws std::runtime_error, with the name of CUDA's error, where the build
// holds none that fits (cudaErrorNoKernelImageForDevice and its like), or where the driver can't tell now.
// Nothing is launched or allocated, so that a full memory or a graph's capture changes no answer.
int running_architecture(int device);

}  // namespace medaccel::probe
