// SPDX-License-Identifier: Apache-2.0
// What a C++ program that checks kernels in the emulator needs: arrays, comparisons, cases chosen by name.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda_portable.h"
#include "common/emulation/harness.h"
#include "common/emulation/memory.h"

namespace driver {

struct CheckFailed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const std::string& claim) {
    if (!holds) throw CheckFailed("host reference: " + claim);
}

// An array in the emulated device's memory; without values it is NaN throughout.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(std::size_t count) : count_(count) { CUDA_CHECK(cudaMalloc(&data_, count * sizeof(T))); }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
        CUDA_CHECK(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~DeviceArray() { cudaFree(data_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    T* data() const { return data_; }

    std::vector<T> host() const {
        std::vector<T> values(count_);
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }

  private:
    T* data_ = nullptr;
    std::size_t count_;
};

// Where a NaN that should not be came from.
inline std::string origin(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto is = [&](std::uint16_t pattern) { return bits == (pattern * 0x10001u); };
    if (is(medaccel::emulation::kUnwrittenGlobal)) return "unwritten output";
    if (is(medaccel::emulation::kUnwrittenShared)) return "uninitialised shared memory";
    if (is(medaccel::emulation::kUndefinedLane)) return "undefined lane";
    return "host reference";
}

// Every element within `tolerance` of the expected one; NaN matches NaN alone.
inline void expect_near(const std::vector<float>& actual, const std::vector<double>& expected, double tolerance) {
    expect(actual.size() == expected.size(), "the sizes differ");
    for (std::size_t i = 0; i < actual.size(); ++i) {
        const bool both_nan = std::isnan(actual[i]) && std::isnan(expected[i]);
        if (both_nan || std::abs(actual[i] - expected[i]) <= tolerance) continue;
        throw CheckFailed(origin(actual[i]) + ": element " + std::to_string(i) + " is " + std::to_string(actual[i]) +
                          ", expected " + std::to_string(expected[i]));
    }
}

// An address range of any size of which only the opened parts exist: any other access is a crash. So a tensor of a
// few elements can have a stride beyond 2^31.
class SparseMemory {
  public:
    explicit SparseMemory(std::size_t bytes) : bytes_(bytes + 2 * kMargin) {
        void* memory = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("SparseMemory: mmap failed");
        base_ = static_cast<char*>(memory);
    }
    ~SparseMemory() { munmap(base_, bytes_); }
    SparseMemory(const SparseMemory&) = delete;
    SparseMemory& operator=(const SparseMemory&) = delete;

    template <class T>
    T* at(std::size_t element) const {
        return reinterpret_cast<T*>(base_ + kMargin) + element;
    }

    // Makes `count` elements from `first` on exist, NaN.
    template <class T>
    T* open(std::size_t first, std::size_t count) {
        T* begin = at<T>(first);
        const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
        const auto from = reinterpret_cast<std::uintptr_t>(begin) / page * page;
        const auto to = reinterpret_cast<std::uintptr_t>(begin + count);
        mprotect(reinterpret_cast<void*>(from), to - from, PROT_READ | PROT_WRITE);
        std::memset(static_cast<void*>(begin), 0xff, count * sizeof(T));
        return begin;
    }

  private:
    static constexpr std::size_t kMargin = std::size_t{1} << 34;  // a negative 32-bit index of doubles lands here
    char* base_ = nullptr;
    std::size_t bytes_;
};

struct Case {
    const char* name;
    void (*run)();
};

// Runs the named cases, or all of them. Prints a line for each; exit status 0 if all of them hold.
inline int run_cases(const std::vector<Case>& cases, int argc, char** argv) {
    int failures = 0, done = 0;
    for (const Case& c : cases) {
        bool chosen = argc < 2;
        for (int i = 1; i < argc; ++i) chosen |= std::strcmp(argv[i], c.name) == 0;
        if (!chosen) continue;
        ++done;
        std::string problem;
        try {
            medaccel::emulation::reset();
            c.run();
        } catch (const CheckFailed& error) {
            problem = std::string("CheckFailed: ") + error.what();
        } catch (const medaccel::emulation::KernelFault& error) {
            problem = std::string("KernelFault: ") + error.what();
        } catch (const medaccel::CudaError& error) {
            problem = std::string("CudaError: ") + error.what();
        }
        failures += !problem.empty();
        std::printf("%s %s%s%s\n", problem.empty() ? "ok" : "FAILED", c.name, problem.empty() ? "" : ": ",
                    problem.c_str());
        std::fflush(stdout);
    }
    if (!done) std::printf("no such case\n");
    return failures || !done;
}

}  // namespace driver
