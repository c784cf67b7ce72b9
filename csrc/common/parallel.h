// SPDX-License-Identifier: Apache-2.0
// This is the only file that uses OpenMP.
//
// A job's result never depends on which thread runs it, so the number of threads changes the speed and no bit
// of the output. One thread means no parallel region at all: libgomp's pool does not survive a fork, so a
// child (a DataLoader worker) must not enter one. `serial_after_fork()` makes sure of that whatever the
// caller asks for.
//
// MEDACCEL_PLAIN_THREADS is for ThreadSanitizer: it knows nothing of libgomp's barriers and would report the accesses
// that they order. Plain threads, each with every so manieth job, show it all that is ordered, and a race between
// jobs however busy the machine is.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <exception>
#if defined(MEDACCEL_PLAIN_THREADS)
#include <thread>
#include <vector>
#endif

namespace medaccel {

inline std::atomic<bool>& in_forked_child() {
    static std::atomic<bool> flag{false};
    return flag;
}

// Called once, when a module is loaded.
inline void serial_after_fork() {
    pthread_atfork(nullptr, nullptr, [] { in_forked_child().store(true); });
}

// Runs job(i, scratch) for i = 0 … n-1. `make_scratch()` is called once in each thread. The first exception
// (in practice std::bad_alloc) is carried out of the parallel region and thrown in the calling thread.
//
// The threads share a counter rather than an `omp for`: a thread whose scratch can't be allocated would never reach
// that loop, and the others would wait for it at the loop's end for ever.
template <class MakeScratch, class Job>
void parallel_for(int64_t n, int threads, const MakeScratch& make_scratch, const Job& job) {
    if (threads > n) threads = static_cast<int>(n);
    if (threads <= 1 || in_forked_child().load()) {
        auto scratch = make_scratch();
        for (int64_t i = 0; i < n; ++i) job(i, scratch);
        return;
    }
    std::exception_ptr error;
    std::atomic<bool> failed{false};
    const auto work = [&](auto next_job) {
        try {
            auto scratch = make_scratch();
            while (!failed.load(std::memory_order_relaxed)) {
                const int64_t i = next_job();
                if (i >= n) break;
                job(i, scratch);
            }
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    };
#if defined(MEDACCEL_PLAIN_THREADS)
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
        team.emplace_back([&, t] { work([i = t - threads, threads]() mutable -> int64_t { return i += threads; }); });
    for (std::thread& member : team) member.join();
#else
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    work([&] { return next.fetch_add(1, std::memory_order_relaxed); });
#endif
    if (error) std::rethrow_exception(error);
}

}  // namespace medaccel
