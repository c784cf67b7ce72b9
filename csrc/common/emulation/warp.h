// SPDX-License-Identifier: Apache-2.0
// One CUDA thread of the running block, and what a warp does together: shuffles, votes, reductions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "execution.h"
#include "fault.h"
#include "memory.h"
#include "sanitizers.h"
#include "vector_types.h"

namespace medaccel::emulation {

inline constexpr unsigned kWarpSize = 32;

struct Thread {
    enum class State { ready, at_block_barrier, at_warp_operation, returned };
    State state = State::ready;
    uint3 index{0, 0, 0};
    unsigned lane = 0, warp = 0;
    Site site;
    WarpRequest request;
    std::uint64_t result = 0;
    bool fenced = false;         // has executed a __threadfence
    std::vector<void*> atomics;  // what it has accessed atomically since its last fence
};

// Two points used in turn: a quick thread is at the next barrier while slow ones are still leaving this one.
struct Barrier {
    SyncPoint points[2];
    unsigned turn = 0;
    SyncPoint* point() { return &points[turn % 2]; }
};

inline std::string hexadecimal(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

// The lanes of one warp of the running block; the last warp may have fewer than 32, the others never existed.
class Warp {
  public:
    // barriers: one per lane, for the masks whose lowest lane it is.
    Warp(Thread* lanes, Barrier* barriers, unsigned count) : lanes_(lanes), barriers_(barriers), count_(count) {}

    // Completes the operation of the lanes in `mask` if all of them have arrived. Lanes that returned are not
    // waited for, as on hardware; reading from them is undefined.
    void try_complete(unsigned mask) {
        unsigned present = 0;
        for (unsigned i = 0; i < count_; ++i) {
            if (!(mask >> i & 1)) continue;
            const Thread& lane = lanes_[i];
            if (lane.state == Thread::State::at_warp_operation && lane.request.mask == mask) {
                present |= 1u << i;
            } else if (lane.state != Thread::State::returned) {
                return;
            }
        }
        if (!present) return;
        const Thread& first = lanes_[__builtin_ctz(present)];
        for (unsigned i = 0; i < count_; ++i) {
            if (!(present >> i & 1)) continue;
            if (lanes_[i].request.operation != first.request.operation || !(lanes_[i].site == first.site)) {
                throw KernelFault("wrong lane mask", "lanes of one mask (" + hexadecimal(mask) +
                                                         ") are at different places: " + first.site.text() + " and " +
                                                         lanes_[i].site.text());
            }
        }
        const std::uint64_t combined = combine(present, first.request.operation);
        for (unsigned i = 0; i < count_; ++i) {
            if (!(present >> i & 1)) continue;
            Thread& lane = lanes_[i];
            lane.result = is_shuffle(first.request.operation) ? shuffled(lane, present) : combined;
            lane.state = Thread::State::ready;
        }
        ++barriers_[__builtin_ctz(mask)].turn;
    }

    // A lane returned, so the others' operation may be complete now.
    void lane_returned() {
        for (unsigned i = 0; i < count_; ++i) {
            if (lanes_[i].state == Thread::State::at_warp_operation) try_complete(lanes_[i].request.mask);
        }
    }

    // The lanes of `mask` that have not arrived.
    unsigned missing(unsigned mask) const {
        unsigned missing = 0;
        for (unsigned i = 0; i < count_; ++i) {
            const Thread& lane = lanes_[i];
            const bool arrived = lane.state == Thread::State::at_warp_operation && lane.request.mask == mask;
            if (mask >> i & 1 && !arrived && lane.state != Thread::State::returned) missing |= 1u << i;
        }
        return missing;
    }

  private:
    static bool is_shuffle(WarpOperation operation) {
        return operation >= WarpOperation::shuffle && operation <= WarpOperation::shuffle_xor;
    }

    std::uint64_t combine(unsigned present, WarpOperation operation) const {
        std::uint64_t result = 0;
        bool first = true;
        for (unsigned i = 0; i < count_; ++i) {
            if (!(present >> i & 1)) continue;
            const std::uint64_t value = lanes_[i].request.value;
            const auto a = static_cast<std::int64_t>(result), b = static_cast<std::int64_t>(value);
            if (operation == WarpOperation::ballot) result |= std::uint64_t{value != 0} << i;
            if (operation == WarpOperation::add) result += value;
            if (operation == WarpOperation::minimum) result = first || b < a ? value : result;
            if (operation == WarpOperation::maximum) result = first || b > a ? value : result;
            first = false;
        }
        return result;
    }

    std::uint64_t shuffled(const Thread& lane, unsigned present) const {
        const int own = static_cast<int>(lane.lane), argument = lane.request.argument, width = lane.request.width;
        const int begin = own / width * width, end = begin + width;
        int source = own;
        switch (lane.request.operation) {
            case WarpOperation::shuffle:
                source = begin + (argument & (width - 1));
                break;
            case WarpOperation::shuffle_up:
                source = own - argument < begin ? own : own - argument;
                break;
            case WarpOperation::shuffle_down:
                source = own + argument >= end ? own : own + argument;
                break;
            default:
                source = (own ^ argument) >= end ? own : own ^ argument;
                break;
        }
        return present >> source & 1 ? lanes_[source].request.value : repeat_pattern(kUndefinedLane);
    }

    Thread* lanes_;
    Barrier* barriers_;
    unsigned count_;
};

}  // namespace medaccel::emulation
