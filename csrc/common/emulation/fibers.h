// SPDX-License-Identifier: Apache-2.0
// Fibers: the stacks that the emulated CUDA threads run on, all within one thread of the operating system.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "sanitizers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace medaccel::emulation {

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and continues on the other stack. swapcontext()
// would do, but it makes two system calls, which would be nine tenths of the emulator's time.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*saved*/, void* /*next*/) {
    asm volatile(
        "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
        "mov %rsp, (%rdi); mov %rsi, %rsp;"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#endif

// Where execution continues, and what the sanitizers must know about its stack.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t registers{};
#endif
    const void* stack_bottom = nullptr;
    std::size_t stack_bytes = 0;
    void* asan_fake_stack = nullptr;
    void* tsan_fiber = nullptr;
};

inline void switch_registers(Context& from, Context& to) {
#if defined(__x86_64__)
    swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.registers, &to.registers);
#endif
}

// Tells ASan that execution has arrived on a stack; `from`, if given, learns the bounds of the one it came
// from.
inline void arrive([[maybe_unused]] void* fake_stack, [[maybe_unused]] Context* from) {
#ifdef MEDACCEL_EMU_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, from ? &from->stack_bottom : nullptr,
                                    from ? &from->stack_bytes : nullptr);
#endif
}

// `learn_bounds`: on arrival back in `from`, note the stack that was left (the host's differs from launch to
// launch).
MEDACCEL_EMU_NO_TSAN inline void switch_context(Context& from, Context& to, bool learn_bounds) {
#ifdef MEDACCEL_EMU_ASAN
    __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef MEDACCEL_EMU_TSAN
    constexpr unsigned kNoSynchronisation = 1;  // being scheduled is no happens-before between CUDA threads
    __tsan_switch_to_fiber(to.tsan_fiber, kNoSynchronisation);
#endif
    switch_registers(from, to);
    arrive(from.asan_fake_stack, learn_bounds ? &to : nullptr);
}

class Fiber {
  public:
    using Entry = void (*)();  // never returns

    Fiber(Entry entry, std::size_t number) {
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        mapped_bytes_ = kStackBytes + page;
        mapped_ =
            mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(mapped_, page, PROT_NONE);  // too deep a stack is a crash, not corruption
        // Neighbouring threads use the same offsets of their stacks at about the same time; staggering them
        // keeps these from sharing one cache set.
        const std::size_t stagger = number % 128 * 320;
        context.stack_bottom = static_cast<char*>(mapped_) + page;
        context.stack_bytes = kStackBytes - stagger;
#ifdef MEDACCEL_EMU_TSAN
        context.tsan_fiber = __tsan_create_fiber(0);
#endif
        begin_at(entry);
    }

    // Whatever the fiber was in the middle of is dropped: destructors of its locals do not run.
    ~Fiber() {
#ifdef MEDACCEL_EMU_TSAN
        __tsan_destroy_fiber(context.tsan_fiber);
#endif
        allow_access(mapped_, mapped_bytes_);
        munmap(mapped_, mapped_bytes_);
    }

    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    Context context;

  private:
    static constexpr std::size_t kStackBytes = 128 << 10;

    void begin_at(Entry entry) {
#if defined(__x86_64__)
        constexpr int kSavedRegisters = 6;
        const auto end = reinterpret_cast<std::uintptr_t>(context.stack_bottom) + context.stack_bytes;
        void** slot = reinterpret_cast<void**>(end & ~std::uintptr_t{15});
        *--slot = nullptr;  // the return address that ends a backtrace
        *--slot = reinterpret_cast<void*>(entry);
        for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
        context.stack_pointer = slot;
#else
        getcontext(&context.registers);
        context.registers.uc_stack.ss_sp = const_cast<void*>(context.stack_bottom);
        context.registers.uc_stack.ss_size = context.stack_bytes;
        context.registers.uc_link = nullptr;
        makecontext(&context.registers, entry, 0);
#endif
    }

    void* mapped_ = nullptr;
    std::size_t mapped_bytes_ = 0;
};

// Fibers are kept from launch to launch. Under TSan there are several sets of them, taken in turn, so that
// neighbouring blocks (and launches) never share one: what runs on the same fiber counts as ordered, and a
// race would go unseen.
class FiberPool {
  public:
    explicit FiberPool(Fiber::Entry entry) : entry_(entry) {}

    // Makes ready the fibers of one more block of `threads` threads.
    void next_block(std::size_t threads) {
        threads_ = threads;
        const std::size_t sets = !kThreadSanitizer ? 1 : threads <= 64 ? 4 : 2;
        while (fibers_.size() < sets * threads) {
            fibers_.push_back(std::make_unique<Fiber>(entry_, fibers_.size()));
        }
        set_ = turn_ % sets;
        shift_ = turn_ / sets % threads;
        if (kThreadSanitizer) ++turn_;
    }

    Fiber& of_thread(std::size_t thread) { return *fibers_[slot(thread)]; }

    // After a fault: a fiber that never finished its block starts afresh.
    void renew(std::size_t thread) {
        const std::size_t number = slot(thread);
        fibers_[number] = std::make_unique<Fiber>(entry_, number);
    }

  private:
    std::size_t slot(std::size_t thread) const { return set_ * threads_ + (thread + shift_) % threads_; }

    Fiber::Entry entry_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::size_t threads_ = 0, set_ = 0, shift_ = 0;
    std::uint64_t turn_ = 0;
};

}  // namespace medaccel::emulation
