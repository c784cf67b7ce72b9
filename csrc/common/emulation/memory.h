// SPDX-License-Identifier: Apache-2.0
// Memory of the emulated device: filled with NaN, and fenced on both sides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizers.h"

namespace medaccel::emulation {

// 16-bit patterns, each a quiet NaN as fp16, bf16, fp32 and fp64, so that a NaN in an output tells where it
// came from.
inline constexpr std::uint16_t kUnwrittenGlobal = 0xffff;
inline constexpr std::uint16_t kUnwrittenShared = 0x7ffb;
inline constexpr std::uint16_t kUndefinedLane = 0x7ffd;

inline std::uint64_t repeat_pattern(std::uint16_t pattern) { return pattern * std::uint64_t{0x0001000100010001}; }

// `bytes` at an address of the given alignment, between two guards that nobody may touch. ASan's own red
// zones are too narrow for the faults of stencils, which miss by a row or a slice.
class GuardedMemory {
  public:
    GuardedMemory(std::size_t bytes, std::size_t alignment, std::size_t guard_bytes, std::uint16_t pattern)
        : bytes_(bytes) {
        Unobserved scope;  // memory new from malloc has no history for TSan
        // Memory of alignment 8 or less is at 8 modulo 16, so that code which relies on a larger alignment
        // is caught.
        const std::size_t skew = alignment <= 8 ? 8 : 0;
        const std::size_t boundary = alignment <= 8 ? 16 : alignment;
        const std::size_t front = (guard_bytes + boundary - 1) / boundary * boundary + skew;
        total_ = (front + bytes + guard_bytes + boundary - 1) / boundary * boundary;
        base_ = static_cast<unsigned char*>(std::aligned_alloc(boundary, total_));
        if (!base_) throw std::bad_alloc();
        data_ = base_ + front;
        auto words = reinterpret_cast<std::uint64_t*>(base_);
        std::fill(words, words + total_ / sizeof(std::uint64_t), repeat_pattern(pattern));
        forbid_access(base_, front);
        forbid_access(data_ + bytes, total_ - front - bytes);
    }

    ~GuardedMemory() {
        Unobserved scope;
        allow_access(base_, total_);
        std::free(base_);
    }

    GuardedMemory(const GuardedMemory&) = delete;
    GuardedMemory& operator=(const GuardedMemory&) = delete;

    void* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

  private:
    unsigned char* base_ = nullptr;
    unsigned char* data_ = nullptr;
    std::size_t bytes_, total_ = 0;
};

}  // namespace medaccel::emulation
