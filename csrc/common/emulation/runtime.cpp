// SPDX-License-Identifier: Apache-2.0
// The emulated CUDA runtime: devices, streams, allocations and errors.
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "harness.h"
#include "launch.h"
#include "memory.h"
#include "runtime_api.h"
#include "scheduler.h"

struct CUstream_st {
    int device;
    bool blocking;  // it and the default stream wait for each other
    medaccel::emulation::StreamOrder order;
};

namespace medaccel::emulation {
namespace {

// The limits of sm_80.
constexpr std::size_t kSharedPerBlock = 48 << 10, kSharedPerBlockOptin = 163 << 10;
constexpr int kMultiprocessors = 4;  // few: kernels that cut their work by them would cut small volumes to crumbs

struct Allocation {
    std::size_t bytes;
    int device;
    std::unique_ptr<GuardedMemory> memory;  // null where the memory was only adopted
};

// One for the process, never destroyed: memory that a test did not free is freed by nobody. Whoever touches
// it, or runs a kernel, holds the mutex.
struct Runtime {
    std::recursive_mutex mutex;
    int device_count = 1;
    std::map<std::uintptr_t, Allocation> allocations;
    std::set<cudaStream_t> streams;
    std::map<int, StreamOrder> default_orders;                                 // by device
    std::map<std::pair<int, const void*>, std::size_t> dynamic_shared_limits;  // by device and kernel
    std::optional<cudaStream_t> required_stream;
    cudaError_t next_launch_error = cudaSuccess, next_call_error = cudaSuccess;
    std::vector<LaunchRecord> launches;
    int synchronizations = 0;

    StreamOrder& order(cudaStream_t stream);
};
Runtime& runtime = *new Runtime;

// As in CUDA, each host thread has its own.
struct HostThread {
    int device = 0;
    bool inside_kernel = false;
    cudaError_t last_error = cudaSuccess;
    std::string detail;  // details beyond CUDA's own error string
};
thread_local HostThread host_thread;

using Lock = std::lock_guard<std::recursive_mutex>;

StreamOrder& Runtime::order(cudaStream_t stream) {
    return stream ? stream->order : default_orders[host_thread.device];
}

cudaError_t fail(cudaError_t error, const std::string& detail) {
    host_thread.last_error = error;
    host_thread.detail = detail;
    return error;
}

// Every call that went well ends here.
cudaError_t succeed() {
    const cudaError_t injected = std::exchange(runtime.next_call_error, cudaSuccess);
    return injected ? fail(injected, "injected by the test") : cudaSuccess;
}

// A use that CUDA would silently accept is a fault here.
cudaError_t check_stream(cudaStream_t stream, const char* work, Site site) {
    if (runtime.required_stream && stream != *runtime.required_stream) {
        throw KernelFault("wrong stream", std::string(work) + " at " + site.text() + " is on " +
                                              (stream ? "another stream" : "the default stream") +
                                              ", not on the caller's");
    }
    if (!stream) return cudaSuccess;
    if (!runtime.streams.count(stream)) return fail(cudaErrorInvalidResourceHandle, "no stream, or a destroyed one");
    if (stream->device != host_thread.device) {
        return fail(cudaErrorInvalidResourceHandle, "the stream belongs to device " + std::to_string(stream->device) +
                                                        ", current is device " + std::to_string(host_thread.device));
    }
    return cudaSuccess;
}

void run(KernelCall call, cudaStream_t stream) {
    if (host_thread.inside_kernel) throw KernelFault("invalid use", call.name + " inside a kernel");
    call.orders = {&runtime.order(stream)};
    for (cudaStream_t other : runtime.streams) {  // the default stream and the blocking ones wait for each other
        if (!stream && other->blocking && other->device == host_thread.device) {
            call.orders.push_back(&other->order);
        }
    }
    struct Inside {
        Inside() { host_thread.inside_kernel = true; }
        ~Inside() { host_thread.inside_kernel = false; }
    } inside;
    run_kernel(*std::make_unique<const KernelCall>(std::move(call)));  // on the heap, as the parameters in launch.h
}

// A fill or a copy: a kernel of one thread, in the stream's order.
cudaError_t run_on_stream(const char* name, cudaStream_t stream, Site site, const std::function<void()>& work) {
    const Lock lock(runtime.mutex);
    if (const cudaError_t error = check_stream(stream, name, site)) return error;
    Unobserved scope;
    run({name, site, dim3(1), dim3(1), 0, {}, work}, stream);
    return succeed();
}

std::string text(dim3 size) {
    return "(" + std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + ")";
}

// Returns "" if a GPU would accept the shape.
std::string shape_problem(dim3 grid, dim3 block) {
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    if (threads < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) {
        return "block " + text(block) + " (expected 1 to 1024 threads, at most 64 along z)";
    }
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return "grid " + text(grid) + " (expected 1 or more blocks, at most 65535 along y and z)";
    }
    return "";
}

// The device that owns the address, or -1 where it is unknown (host memory, or no address at all).
int owner(std::uintptr_t address) {
    const auto next = runtime.allocations.upper_bound(address);
    if (next == runtime.allocations.begin()) return -1;
    const auto& [begin, allocation] = *std::prev(next);
    return address < begin + allocation.bytes ? allocation.device : -1;
}

// The device, other than the current one, that a pointer within the parameter belongs to; -1 where there is
// none.
int foreign_device(const Bytes& parameter) {
    for (std::size_t offset = 0; offset + sizeof(std::uintptr_t) <= parameter.count; offset += alignof(void*)) {
        std::uintptr_t word;
        std::memcpy(&word, static_cast<const char*>(parameter.begin) + offset, sizeof word);
        const int device = owner(word);
        if (device >= 0 && device != host_thread.device) return device;
    }
    return -1;
}

}  // namespace

void launch(const LaunchRequest& request, const std::vector<Bytes>& parameters, std::function<void()> body) {
    const Lock lock(runtime.mutex);
    Unobserved scope;
    if (const cudaError_t injected = std::exchange(runtime.next_launch_error, cudaSuccess)) {
        fail(injected, "injected by the test");
        return;
    }
    if (const std::string problem = shape_problem(request.grid, request.block); !problem.empty()) {
        fail(cudaErrorInvalidConfiguration, problem);
        return;
    }
    const auto raised = runtime.dynamic_shared_limits.find({host_thread.device, request.kernel});
    const std::size_t limit = raised == runtime.dynamic_shared_limits.end() ? kSharedPerBlock : raised->second;
    if (request.dynamic_shared_bytes > limit) {
        fail(cudaErrorInvalidValue, std::to_string(request.dynamic_shared_bytes) +
                                        " bytes of dynamic shared memory (on this device the kernel may have " +
                                        std::to_string(limit) + "; see cudaFuncSetAttribute)");
        return;
    }
    if (check_stream(request.stream, request.kernel_name, request.site) != cudaSuccess) return;
    for (const Bytes& parameter : parameters) {
        const int device = foreign_device(parameter);
        if (device < 0) continue;
        throw KernelFault("wrong device", std::string(request.kernel_name) + " at " + request.site.text() +
                                              " is launched on device " + std::to_string(host_thread.device) +
                                              " with an argument that points to device " + std::to_string(device));
    }
    runtime.launches.push_back({request.kernel_name, request.grid, request.block, request.dynamic_shared_bytes,
                                host_thread.device, request.stream});
    run({request.kernel_name,
         request.site,
         request.grid,
         request.block,
         request.dynamic_shared_bytes,
         {},
         std::move(body)},
        request.stream);
}

void reset() {
    const Lock lock(runtime.mutex);
    runtime.device_count = 1;
    runtime.required_stream.reset();
    runtime.next_launch_error = runtime.next_call_error = cudaSuccess;
    runtime.launches.clear();
    runtime.synchronizations = 0;
    host_thread = {};
}

void set_device_count(int count) {
    const Lock lock(runtime.mutex);
    runtime.device_count = count;
}

void require_stream(cudaStream_t stream) {
    const Lock lock(runtime.mutex);
    runtime.required_stream = stream;
}

void adopt_memory(const void* begin, std::size_t bytes, int device) {
    const Lock lock(runtime.mutex);
    runtime.allocations[reinterpret_cast<std::uintptr_t>(begin)] = {bytes, device, nullptr};
}

void disown_memory(const void* begin) {
    const Lock lock(runtime.mutex);
    runtime.allocations.erase(reinterpret_cast<std::uintptr_t>(begin));
}

void inject_earlier_error(cudaError_t error) { fail(error, "injected by the test"); }

void fail_next_launch(cudaError_t error) {
    const Lock lock(runtime.mutex);
    runtime.next_launch_error = error;
}

void fail_next_call(cudaError_t error) {
    const Lock lock(runtime.mutex);
    runtime.next_call_error = error;
}

std::vector<LaunchRecord> take_launches() {
    const Lock lock(runtime.mutex);
    return std::exchange(runtime.launches, {});
}

int synchronizations() {
    const Lock lock(runtime.mutex);
    return runtime.synchronizations;
}

}  // namespace medaccel::emulation

// ---- The functions by their own names
// --------------------------------------------------------------------------------

using namespace medaccel::emulation;

cudaError_t cudaPeekAtLastError() { return host_thread.last_error; }

cudaError_t cudaGetLastError() { return std::exchange(host_thread.last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define NAME(name, code) \
    case name:           \
        return #name;
        MEDACCEL_EMU_ERRORS(NAME)
#undef NAME
    }
    return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
    return host_thread.detail.empty() ? cudaGetErrorName(error) : host_thread.detail.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) {
    const Lock lock(runtime.mutex);
    *count = runtime.device_count;
    return *count ? succeed() : fail(cudaErrorNoDevice, "the test asked for none");
}

cudaError_t cudaGetDevice(int* device) {
    const Lock lock(runtime.mutex);
    *device = host_thread.device;
    return succeed();
}

cudaError_t cudaSetDevice(int device) {
    const Lock lock(runtime.mutex);
    if (device < 0 || device >= runtime.device_count) {
        return fail(cudaErrorInvalidDevice,
                    "device " + std::to_string(device) + " of " + std::to_string(runtime.device_count));
    }
    host_thread.device = device;
    return succeed();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const Lock lock(runtime.mutex);
    if (device < 0 || device >= runtime.device_count)
        return fail(cudaErrorInvalidDevice, "device " + std::to_string(device));
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = kSharedPerBlock;
            return succeed();
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = kSharedPerBlockOptin;
            return succeed();
        case cudaDevAttrMultiProcessorCount:
            *value = kMultiprocessors;
            return succeed();
        case cudaDevAttrComputeCapabilityMajor:
            *value = 8;
            return succeed();
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            return succeed();
    }
    return fail(cudaErrorInvalidValue, "attribute " + std::to_string(attribute));
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    const Lock lock(runtime.mutex);
    *stream = new CUstream_st{host_thread.device, flags == cudaStreamDefault, {}};
    runtime.streams.insert(*stream);
    return succeed();
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const Lock lock(runtime.mutex);
    if (!runtime.streams.erase(stream)) return fail(cudaErrorInvalidResourceHandle, "no stream, or a destroyed one");
    delete stream;
    return succeed();
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const Lock lock(runtime.mutex);
    ++runtime.synchronizations;
    runtime.order(stream).observe();
    return succeed();
}

cudaError_t cudaDeviceSynchronize() {
    const Lock lock(runtime.mutex);
    ++runtime.synchronizations;
    runtime.order(nullptr).observe();
    for (cudaStream_t stream : runtime.streams) {
        if (stream->device == host_thread.device) stream->order.observe();
    }
    return succeed();
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    constexpr std::size_t kAlignment = 256, kGuard = 256 << 10;
    const Lock lock(runtime.mutex);
    auto allocation = std::make_unique<GuardedMemory>(bytes, kAlignment, kGuard, kUnwrittenGlobal);
    *memory = allocation->data();
    runtime.allocations[reinterpret_cast<std::uintptr_t>(*memory)] = {bytes, host_thread.device,
                                                                      std::move(allocation)};
    return succeed();
}

cudaError_t cudaFree(void* memory) {
    if (!memory) return cudaSuccess;
    const Lock lock(runtime.mutex);
    const bool known = runtime.allocations.erase(reinterpret_cast<std::uintptr_t>(memory));
    return known ? succeed() : fail(cudaErrorInvalidValue, "cudaFree of memory that is not cudaMalloc's");
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream,
                            Site site) {
    return run_on_stream("cudaMemcpyAsync", stream, site, [=] { std::memcpy(to, from, bytes); });
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream, Site site) {
    return run_on_stream("cudaMemsetAsync", stream, site, [=] { std::memset(to, value, bytes); });
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, Site site) {
    const cudaError_t error = run_on_stream("cudaMemcpy", nullptr, site, [=] { std::memcpy(to, from, bytes); });
    return error ? error : cudaStreamSynchronize(nullptr);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    const Lock lock(runtime.mutex);
    if (bytes < 0 || static_cast<std::size_t>(bytes) > kSharedPerBlockOptin) {
        return fail(cudaErrorInvalidValue, std::to_string(bytes) +
                                               " bytes of dynamic shared memory (a block may have " +
                                               std::to_string(kSharedPerBlockOptin) + ")");
    }
    runtime.dynamic_shared_limits[{host_thread.device, kernel}] = static_cast<std::size_t>(bytes);
    return succeed();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    const Lock lock(runtime.mutex);
    if (!attributes || !kernel) return fail(cudaErrorInvalidValue, "attributes of no kernel, or to no place");
    *attributes = {0, 0};
    return succeed();
}
