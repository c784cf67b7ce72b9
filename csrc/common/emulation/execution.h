// SPDX-License-Identifier: Apache-2.0
// The emulator's services for running kernels, implemented in scheduler.cpp. device_api.h puts CUDA's names on top.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fault.h"
#include "vector_types.h"

namespace medaccel::emulation {

// The thread whose turn it is.
struct Running {
    const uint3* thread_index = nullptr;  // null: no kernel is running
    uint3 block_index{0, 0, 0};
    dim3 block, grid;
};
inline Running running;

[[noreturn]] void fault_outside_kernel();

inline const Running& inside_kernel() {
    if (!running.thread_index) fault_outside_kernel();
    return running;
}

// __syncthreads
void block_barrier(Site site);

enum class WarpOperation { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, add, minimum, maximum };

struct WarpRequest {
    WarpOperation operation = WarpOperation::sync;
    unsigned mask = 0;
    std::uint64_t value = 0;  // 32-bit values are widened; minimum and maximum compare as signed 64-bit numbers
    int argument = 0;         // the lane, the distance or the lane mask of a shuffle
    int width = 32;
};

// Waits for the lanes of the mask and returns this lane's result of the operation.
std::uint64_t warp_operation(const WarpRequest& request, Site site);

// The running block's shared array that `key` stands for, filled with NaN when the block first asks for it.
void* shared_array(const void* key, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();

// An atomic access orders memory only together with fences: what a thread wrote before its fence is visible
// to one that sees its later atomic access and then has a fence of its own.
void fence();
void before_atomic(void* address);

}  // namespace medaccel::emulation
