// SPDX-License-Identifier: Apache-2.0
// What parallel_for does with an exception, in scratch or job, of one thread or of all: thrown in the caller, once.
#include "../../csrc/common/parallel.h"

#include <omp.h>

#include <chrono>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using medaccel::parallel_for;

namespace {

constexpr int kThreads = 2;
constexpr int64_t kJobs = 64;

int scratches_alive = 0;
struct Scratch {
    Scratch() { count(1); }
    Scratch(const Scratch&) = delete;
    ~Scratch() { count(-1); }
    static void count(int by) {
#pragma omp atomic
        scratches_alive += by;
    }
};

// What the caller sees, and whether every scratch is gone by then.
template <class MakeScratch, class Job>
std::string outcome(const MakeScratch& make_scratch, const Job& job) {
    std::string seen = "nothing";
    try {
        parallel_for(kJobs, kThreads, make_scratch, job);
    } catch (const std::bad_alloc&) {
        seen = "bad_alloc";
    } catch (const std::runtime_error& error) {
        seen = error.what();
    }
    return scratches_alive == 0 ? seen : seen + ", scratch left behind";
}

void report(const char* name, const std::string& seen) { std::printf("%s: %s\n", name, seen.c_str()); }

// The other thread is surely among the jobs, or done with them, when this one fails.
Scratch failing_in_thread(int which) {
    if (omp_get_thread_num() == which) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        throw std::bad_alloc();
    }
    return Scratch();
}

}  // namespace

int main() {
    const auto nothing = [](int64_t, Scratch&) {};
    report("scratch of thread 0", outcome([] { return failing_in_thread(0); }, nothing));
    report("scratch of thread 1", outcome([] { return failing_in_thread(1); }, nothing));
    report("scratch of all", outcome([]() -> Scratch { throw std::bad_alloc(); }, nothing));
    report("job 5", outcome([] { return Scratch(); },
                            [](int64_t i, Scratch&) {
                                if (i == 5) throw std::runtime_error("job 5 failed");
                            }));
    report("every job",
           outcome([] { return Scratch(); }, [](int64_t, Scratch&) { throw std::runtime_error("a job failed"); }));
    std::vector<int> runs(kJobs, 0);
    report("none", outcome([] { return Scratch(); }, [&](int64_t i, Scratch&) { ++runs[i]; }));
    for (int count : runs)
        if (count != 1) std::printf("a job ran %d times\n", count);
}
