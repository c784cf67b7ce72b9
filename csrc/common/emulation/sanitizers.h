// SPDX-License-Identifier: Apache-2.0
// The emulator's messages to ASan and TSan, which cost nothing in a build without them.
//
// Kernels and drivers are compiled with -fsanitize=…; the emulator's own sources need only know of it
// (-DMEDACCEL_EMU_ASAN, -DMEDACCEL_EMU_TSAN), which compiles faster and keeps their accesses out of TSan's sight.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__) && !defined(MEDACCEL_EMU_ASAN)
#define MEDACCEL_EMU_ASAN
#endif
#if defined(__SANITIZE_THREAD__) && !defined(MEDACCEL_EMU_TSAN)
#define MEDACCEL_EMU_TSAN
#endif

#ifdef MEDACCEL_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef MEDACCEL_EMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define MEDACCEL_EMU_NO_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define MEDACCEL_EMU_NO_TSAN __attribute__((noinline))
#endif

namespace medaccel::emulation {

#ifdef MEDACCEL_EMU_TSAN
inline constexpr bool kThreadSanitizer = true;
inline void tsan_acquire(void* address) { __tsan_acquire(address); }
inline void tsan_release(void* address) { __tsan_release(address); }
#else
inline constexpr bool kThreadSanitizer = false;
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
#endif

// An edge of the happens-before order: published writes are visible to threads that observe afterwards.
class SyncPoint {
  public:
    void publish() { tsan_release(&here_); }
    void observe() { tsan_acquire(&here_); }

  private:
    alignas(8) char here_ = 0;
};

// The emulator's own reads and writes are no part of the kernel: TSan must not see them.
class Unobserved {
  public:
#ifdef MEDACCEL_EMU_TSAN
    Unobserved() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~Unobserved() {
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreReadsEnd("", 0);
    }
#else
    Unobserved() {}
    ~Unobserved() {}
#endif
    Unobserved(const Unobserved&) = delete;
    Unobserved& operator=(const Unobserved&) = delete;
};

inline void forbid_access([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes) {
#ifdef MEDACCEL_EMU_ASAN
    __asan_poison_memory_region(begin, bytes);
#endif
}

inline void allow_access([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes) {
#ifdef MEDACCEL_EMU_ASAN
    __asan_unpoison_memory_region(begin, bytes);
#endif
}

}  // namespace medaccel::emulation
