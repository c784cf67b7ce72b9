// SPDX-License-Identifier: Apache-2.0
// Runs a kernel: blocks one after another, a block's threads in turn, each until it waits or returns.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "fault.h"
#include "sanitizers.h"
#include "vector_types.h"

namespace medaccel::emulation {

// The order of a stream's work. Work observes one point and publishes to the other, then they change places:
// with a single one, the later blocks of a launch would come after the earlier ones, and no race between
// blocks would show.
class StreamOrder {
  public:
    void observe() { point(0).observe(); }
    void publish() { point(1).publish(); }
    void work_done() { ++turn_; }

  private:
    SyncPoint& point(unsigned ahead) {
        Unobserved scope;
        return points_[(turn_ + ahead) % 2];
    }

    SyncPoint points_[2];
    unsigned turn_ = 0;
};

struct KernelCall {
    std::string name;
    Site site;
    dim3 grid, block;
    std::size_t dynamic_shared_bytes = 0;
    std::vector<StreamOrder*> orders;  // orders of the streams that it waits for
    std::function<void()> body;        // one thread's work
};

// The caller runs one kernel at a time. Throws KernelFault, and is ready for the next kernel then.
void run_kernel(const KernelCall& call);

}  // namespace medaccel::emulation
