// SPDX-License-Identifier: Apache-2.0
#include "scheduler.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

#include "execution.h"
#include "fibers.h"
#include "memory.h"
#include "order.h"
#include "warp.h"

namespace medaccel::emulation {
namespace {

constexpr std::size_t kStaticSharedLimit = 48 << 10;
constexpr std::size_t kSharedGuard = 1 << 10;

class Scheduler {
  public:
    void run(const KernelCall& call) {
        Unobserved scope;
        running.block = call.block;
        running.grid = call.grid;
        call_ = &call;
        const unsigned threads = call.block.x * call.block.y * call.block.z;
        const std::uint64_t blocks = std::uint64_t{call.grid.x} * call.grid.y * call.grid.z;
        Order order = Order::from_environment();
        order.begin(blocks, threads);
        prepare_threads(threads);
#ifdef MEDACCEL_EMU_TSAN
        host_.tsan_fiber = __tsan_get_current_fiber();
#endif
        host_order_.publish();
        for (std::uint64_t k = 0; k < blocks; ++k) {
            const std::uint64_t b = order.block(k);
            running.block_index = {static_cast<unsigned>(b % call.grid.x),
                                   static_cast<unsigned>(b / call.grid.x % call.grid.y),
                                   static_cast<unsigned>(b / call.grid.x / call.grid.y)};
            run_block(order.threads());
        }
        for (StreamOrder* stream : call.orders) stream->work_done();
        call_ = nullptr;
    }

    // ---- Called by the emulated threads ----

    Thread& current() {
        if (!current_) fault_outside_kernel();
        return *current_;
    }

    void block_barrier(Site site) {
        current();
        wait(Thread::State::at_block_barrier, site, barriers_->block.point());
    }

    std::uint64_t warp_operation(const WarpRequest& request, Site site) {
        Thread& me = current();
        const bool power_of_two = request.width > 0 && !(request.width & (request.width - 1));
        if (!(request.mask >> me.lane & 1)) {
            throw KernelFault("wrong lane mask", "lane " + std::to_string(me.lane) + " calls with the mask " +
                                                     hexadecimal(request.mask) + ", which it is not in, at " +
                                                     site.text());
        }
        if (!power_of_two || request.width > static_cast<int>(kWarpSize)) {
            throw KernelFault("invalid use", "shuffle width " + std::to_string(request.width) +
                                                 " (expected a power of two up to 32) at " + site.text());
        }
        SyncPoint* barrier = nullptr;  // only __syncwarp orders memory
        {
            Unobserved scope;
            me.request = request;
            const unsigned lowest = me.warp * kWarpSize + static_cast<unsigned>(__builtin_ctz(request.mask));
            if (request.operation == WarpOperation::sync) barrier = barriers_->warp[lowest].point();
        }
        wait(Thread::State::at_warp_operation, site, barrier);
        return me.result;
    }

    // The block's copy of the shared array that `key` stands for.
    void* shared(const void* key, std::size_t bytes, std::size_t alignment) {
        Unobserved scope;
        for (const auto& [known, memory] : shared_) {
            if (known == key) return memory->data();
        }
        static_shared_bytes_ += bytes;
        if (static_shared_bytes_ > kStaticSharedLimit) {
            throw KernelFault("invalid use", "more than 48 KiB of static shared memory (" +
                                                 std::to_string(static_shared_bytes_) + " bytes; use DYN_SHARED)");
        }
        shared_.emplace_back(key, std::make_unique<GuardedMemory>(bytes, alignment, kSharedGuard, kUnwrittenShared));
        return shared_.back().second->data();
    }

    void* dynamic_shared() { return current(), dynamic_shared_ ? dynamic_shared_->data() : nullptr; }

  private:
    static void thread_main();

    void prepare_threads(unsigned count) {
        threads_.clear();
        threads_.resize(count);
        const dim3 size = call_->block;
        for (unsigned i = 0; i < count; ++i) {
            threads_[i].index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
            threads_[i].lane = i % kWarpSize;
            threads_[i].warp = i / kWarpSize;
        }
    }

    void run_block(const std::vector<unsigned>& order) {
        fibers_.next_block(threads_.size());
        for (Thread& thread : threads_) {
            thread.state = Thread::State::ready;
            thread.fenced = false;
            thread.atomics.clear();
        }
        barriers_ = std::make_unique<Barriers>(threads_.size());
        live_ = static_cast<unsigned>(threads_.size());
        at_barrier_ = 0;
        if (call_->dynamic_shared_bytes) {
            dynamic_shared_ =
                std::make_unique<GuardedMemory>(call_->dynamic_shared_bytes, 16, kSharedGuard, kUnwrittenShared);
        }
        try {
            while (live_) {
                bool progress = false;
                for (unsigned i : order) {
                    if (threads_[i].state != Thread::State::ready) continue;
                    progress = true;
                    resume(i);
                }
                if (live_ && at_barrier_ == live_) {
                    release_barrier();
                    progress = true;
                }
                if (!progress) throw KernelFault("deadlock", "no thread can go on");
            }
        } catch (const KernelFault& fault) {
            const std::string text = report(fault.what());
            abandon_block();
            throw KernelFault(fault.kind(), text.substr(fault.kind().size() + 2));
        } catch (...) {
            abandon_block();
            throw;
        }
        end_block();
    }

    void resume(unsigned i) {
        Thread& thread = threads_[i];
        current_ = &thread;
        running.thread_index = &thread.index;
        switch_context(host_, fibers_.of_thread(i).context, false);
        current_ = nullptr;
        running.thread_index = nullptr;
        if (fault_) std::rethrow_exception(std::exchange(fault_, nullptr));
        if (thread.state == Thread::State::at_block_barrier) ++at_barrier_;
        if (thread.state == Thread::State::at_warp_operation) warp_of(thread).try_complete(thread.request.mask);
        if (thread.state == Thread::State::returned) {
            --live_;
            warp_of(thread).lane_returned();
        }
    }

    void release_barrier() {
        const Thread* first = nullptr;
        for (Thread& thread : threads_) {
            if (thread.state != Thread::State::at_block_barrier) continue;
            if (!first) first = &thread;
            if (!(thread.site == first->site)) {
                throw KernelFault("barrier divergence", "one block's threads wait in different __syncthreads");
            }
        }
        for (Thread& thread : threads_) {
            if (thread.state == Thread::State::at_block_barrier) thread.state = Thread::State::ready;
        }
        at_barrier_ = 0;
        ++barriers_->block.turn;
    }

    void wait(Thread::State state, Site site, SyncPoint* barrier) {
        Thread& me = current();
        if (barrier) barrier->publish();
        {
            Unobserved scope;
            me.site = site;
            me.state = state;
        }
        to_host();
        if (barrier) barrier->observe();
    }

    void to_host() {
        const auto number = static_cast<std::size_t>(current_ - threads_.data());
        switch_context(fibers_.of_thread(number).context, host_, true);
    }

    Warp warp_of(const Thread& thread) {
        const std::size_t first = std::size_t{thread.warp} * kWarpSize;
        const std::size_t count = std::min<std::size_t>(kWarpSize, threads_.size() - first);
        return Warp(&threads_[first], &barriers_->warp[first], static_cast<unsigned>(count));
    }

    void end_block() {
        shared_.clear();
        static_shared_bytes_ = 0;
        dynamic_shared_.reset();
    }

    void abandon_block() {
        for (std::size_t i = 0; i < threads_.size(); ++i) {
            if (threads_[i].state != Thread::State::returned) fibers_.renew(i);
        }
        call_ = nullptr;
        end_block();
    }

    std::string report(const std::string& what) const;

    // New for each block: TSan keeps what was published at an address until its memory is freed, and a block
    // that observed the barriers of an earlier one would come after it.
    struct Barriers {
        explicit Barriers(std::size_t threads) : warp(threads) {}
        Barrier block;
        std::vector<Barrier> warp;
    };

    const KernelCall* call_ = nullptr;
    SyncPoint host_order_;
    Context host_;
    FiberPool fibers_{&Scheduler::thread_main};
    std::vector<Thread> threads_;
    Thread* current_ = nullptr;
    std::exception_ptr fault_;
    unsigned live_ = 0, at_barrier_ = 0;
    std::unique_ptr<Barriers> barriers_;
    std::vector<std::pair<const void*, std::unique_ptr<GuardedMemory>>> shared_;
    std::size_t static_shared_bytes_ = 0;
    std::unique_ptr<GuardedMemory> dynamic_shared_;
};

// Never destroyed: fibers that a kernel left behind may still refer to it when the process ends.
Scheduler& scheduler = *new Scheduler;

// What every fiber executes: one emulated thread after another, as long as the process lives.
void Scheduler::thread_main() {
    Scheduler& self = scheduler;
    arrive(nullptr, &self.host_);
    for (;;) {
        self.host_order_.observe();
        for (StreamOrder* stream : self.call_->orders) stream->observe();
        std::exception_ptr fault;
        try {
            self.call_->body();
        } catch (...) {
            fault = std::current_exception();
        }
        for (StreamOrder* stream : self.call_->orders) stream->publish();
        {
            Unobserved scope;
            self.fault_ = std::exchange(fault, nullptr);
            self.current_->state = Thread::State::returned;
        }
        self.to_host();
    }
}

// Says which threads wait where: consecutive threads that do the same are one line.
std::string Scheduler::report(const std::string& what) const {
    std::string text = what + "\n  in kernel " + call_->name + ", launched at " + call_->site.text() + ", block (" +
                       std::to_string(running.block_index.x) + "," + std::to_string(running.block_index.y) + "," +
                       std::to_string(running.block_index.z) + ")";
    constexpr int kMostLines = 12;
    int lines = 0;
    for (std::size_t begin = 0, end; begin < threads_.size(); begin = end) {
        const Thread& first = threads_[begin];
        for (end = begin + 1; end < threads_.size(); ++end) {
            const Thread& next = threads_[end];
            const bool waits =
                first.state == Thread::State::at_block_barrier || first.state == Thread::State::at_warp_operation;
            if (next.state != first.state || (waits && !(next.site == first.site)) ||
                (first.state == Thread::State::at_warp_operation &&
                 (next.warp != first.warp || next.request.mask != first.request.mask)))
                break;
        }
        if (++lines > kMostLines) return text + "\n  …";
        text += "\n  threads " + std::to_string(begin) + "-" + std::to_string(end - 1);
        switch (first.state) {
            case Thread::State::ready:
                text += " could go on";
                break;
            case Thread::State::returned:
                text += " have returned";
                break;
            case Thread::State::at_block_barrier:
                text += " wait in __syncthreads at " + first.site.text();
                break;
            case Thread::State::at_warp_operation: {
                Warp warp = const_cast<Scheduler*>(this)->warp_of(first);
                text += " wait in a warp operation at " + first.site.text() + ", mask " +
                        hexadecimal(first.request.mask) + ", for the lanes " +
                        hexadecimal(warp.missing(first.request.mask));
                break;
            }
        }
    }
    return text;
}

}  // namespace

void run_kernel(const KernelCall& call) { scheduler.run(call); }

void fault_outside_kernel() { throw KernelFault("invalid use", "device code was called outside a kernel"); }

void block_barrier(Site site) { scheduler.block_barrier(site); }

std::uint64_t warp_operation(const WarpRequest& request, Site site) {
    return scheduler.warp_operation(request, site);
}

void* shared_array(const void* key, std::size_t bytes, std::size_t alignment) {
    return scheduler.shared(key, bytes, alignment);
}

void* dynamic_shared() { return scheduler.dynamic_shared(); }

void fence() {
    Thread& me = scheduler.current();
    for (void* address : me.atomics) tsan_acquire(address);
    Unobserved scope;
    me.atomics.clear();
    me.fenced = true;
}

void before_atomic(void* address) {
    Thread& me = scheduler.current();
    if (me.fenced) tsan_release(address);
    Unobserved scope;
    if (kThreadSanitizer) me.atomics.push_back(address);
}

}  // namespace medaccel::emulation
