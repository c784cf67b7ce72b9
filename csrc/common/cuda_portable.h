// SPDX-License-Identifier: Apache-2.0
// One source for the GPU and for the emulator: nvcc compiles a .cu file to kernels, g++ (-x c++) to code that
// executes the same kernels on the CPU, where they are checked (tests/cuda_emulation/README.md).
//
// A .cu file uses CUDA's own names, but for three spellings that g++ could not read:
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments…)    kernel<<<…>>>(…), every error checked
//   SHARED(type, name, [extents]…)                                   __shared__ type name[extents]…
//   DYN_SHARED(type, name)                                           the launch's shared_bytes as a type*
// A kernel template goes into parentheses: LAUNCH((blur<float, 4>), …). `stream` may be a void*.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MEDACCEL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<(grid), (block), (shared_bytes), ::medaccel::as_stream(stream)>>>(__VA_ARGS__)
#define SHARED(type, name, extents) __shared__ type name extents
#define DYN_SHARED(type, name)                                                \
    extern __shared__ __align__(16) unsigned char medaccel_dynamic_shared_[]; \
    type* const name = reinterpret_cast<type*>(medaccel_dynamic_shared_)

#else

#include "emulation/device_api.h"
#include "emulation/launch.h"

#define MEDACCEL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                         \
    ::medaccel::emulation::launch_kernel(#kernel, ::medaccel::emulation::Site::here(), kernel, (grid), (block), \
                                         (shared_bytes), ::medaccel::as_stream(stream), __VA_ARGS__)
#define SHARED(type, name, extents)                                 \
    static char name##_key_; /* its address stands for the array */ \
    using name##_array_ = type extents;                             \
    name##_array_& name = *static_cast<name##_array_*>(             \
        ::medaccel::emulation::shared_array(&name##_key_, sizeof(name##_array_), alignof(name##_array_)))
#define DYN_SHARED(type, name) type* const name = static_cast<type*>(::medaccel::emulation::dynamic_shared())

#endif

// The launch itself returns nothing; its errors, and those of a kernel launched before, are queried
// around it.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                   \
    do {                                                                         \
        ::medaccel::check_before_launch(#kernel, __FILE__, __LINE__);            \
        MEDACCEL_LAUNCH(kernel, grid, block, shared_bytes, stream, __VA_ARGS__); \
        CUDA_CHECK_LAUNCH(kernel);                                               \
    } while (false)

#define CUDA_CHECK(expression) ::medaccel::check_cuda((expression), #expression, __FILE__, __LINE__)
#define CUDA_CHECK_LAUNCH(kernel) ::medaccel::check_launch(#kernel, __FILE__, __LINE__)

namespace medaccel {

class CudaError : public std::runtime_error {
  public:
    CudaError(cudaError_t code, const std::string& message) : std::runtime_error(message), code_(code) {}
    cudaError_t code() const { return code_; }

  private:
    cudaError_t code_;
};

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// The next call returns the errors of a running kernel, and is not to blame for them.
inline bool is_asynchronous(cudaError_t error) {
    switch (error) {
        case cudaErrorECCUncorrectable:
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorHardwareStackError:
        case cudaErrorIllegalInstruction:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorLaunchFailure:
            return true;
        default:
            return false;
    }
}

// "gaussian/cuda.cu:12", wherever the source was compiled.
inline std::string source_place(const char* file, int line) {
    std::string path = file;
    const auto name = path.rfind('/');
    const auto folder = name == std::string::npos || name == 0 ? std::string::npos : path.rfind('/', name - 1);
    return (folder == std::string::npos ? path : path.substr(folder + 1)) + ":" + std::to_string(line);
}

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const std::string& what, const char* file, int line) {
    throw CudaError(error, source_place(file, line) + ": " + what + ": " + cudaGetErrorName(error) + " (" +
                               cudaGetErrorString(error) + ")");
}

inline void check_cuda(cudaError_t error, const char* expression, const char* file, int line) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported once, here
    const std::string blame = is_asynchronous(error) ? " met the error of an earlier kernel" : " failed";
    throw_cuda_error(error, expression + blame, file, line);
}

inline void check_before_launch(const char* kernel, const char* file, int line) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return;
    throw_cuda_error(error, std::string("before the launch of ") + kernel + ": error of an earlier kernel or call",
                     file, line);
}

// A faulty kernel of someone else (PyTorch's, say) may show only here: its error waits in the driver until a
// call asks.
inline void check_launch(const char* kernel, const char* file, int line) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return;
    const char* blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
    const bool waited = blocking && std::strcmp(blocking, "1") == 0;
    std::string what = std::string("launch of ") + kernel;
    if (!is_asynchronous(error)) {
        what += " failed";
    } else if (waited) {
        what = std::string("kernel ") + kernel + " failed";
    } else {
        what += " met the error of a kernel launched earlier (CUDA_LAUNCH_BLOCKING=1 shows which)";
    }
    throw_cuda_error(error, what, file, line);
}

// Makes `device` the current one as long as this lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        CUDA_CHECK(cudaGetDevice(&before_));
        if (device == before_) return;
        CUDA_CHECK(cudaSetDevice(device));
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);  // it was current a moment ago: nothing to report
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace medaccel
