// SPDX-License-Identifier: Apache-2.0
// The tests' interface to the emulated CUDA runtime.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "runtime_api.h"
#include "vector_types.h"

namespace medaccel::emulation {

struct LaunchRecord {
    std::string kernel;
    dim3 grid, block;
    std::size_t dynamic_shared_bytes;
    int device;
    cudaStream_t stream;
};

// Undoes the settings below, and makes device 0 current. Allocations and streams stay.
void reset();

void set_device_count(int count);  // 1 at first

// From now on every launch, copy and fill must be on this stream, or is a KernelFault.
void require_stream(cudaStream_t stream);

// Memory that did not come from cudaMalloc (a tensor's, say) is the given device's from now on.
void adopt_memory(const void* begin, std::size_t bytes, int device);
void disown_memory(const void* begin);

void inject_earlier_error(cudaError_t error);  // as if a kernel launched before had failed
void fail_next_launch(cudaError_t error);
void fail_next_call(cudaError_t error);  // an error of any other function

// Launches since the last reset() or take_launches().
std::vector<LaunchRecord> take_launches();

// How often the host has waited for a device since the last reset().
int synchronizations();

}  // namespace medaccel::emulation
