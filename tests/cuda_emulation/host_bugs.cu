// SPDX-License-Identifier: Apache-2.0
// Bugs of the code that launches: stream, device, shape, shared memory, errors.
#include "planted_bugs.h"

namespace {

using driver::DeviceArray;

__global__ void fill(float* out, int n) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    if (i < n) out[i] = 3.f;
}

__global__ void fill_through_shared(float* out) {
    DYN_SHARED(float, tile);
    tile[threadIdx.x] = 3.f;
    out[threadIdx.x] = tile[threadIdx.x];
}

struct Stream {
    Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(handle); }
    cudaStream_t handle;
};

template <bool planted>
void wrong_stream() {
    Stream callers, another;
    DeviceArray<float> out(32);
    medaccel::emulation::require_stream(callers.handle);
    LAUNCH(fill, 1, 32, 0, planted ? another.handle : callers.handle, out.data(), 32);
}

template <bool planted>
void default_stream() {  // the stream argument was forgotten
    Stream callers;
    DeviceArray<float> out(32);
    medaccel::emulation::require_stream(callers.handle);
    CUDA_CHECK(cudaMemsetAsync(out.data(), 0, 32 * sizeof(float), planted ? nullptr : callers.handle));
}

// The tensor lives on device 1, while the caller's current device is 0.
template <bool planted>
void wrong_device() {
    medaccel::emulation::set_device_count(2);
    float* on_one;
    {
        medaccel::DeviceGuard guard(1);
        CUDA_CHECK(cudaMalloc(&on_one, 32 * sizeof(float)));
    }
    {
        medaccel::DeviceGuard guard(planted ? 0 : 1);
        LAUNCH(fill, 1, 32, 0, nullptr, on_one, 32);
    }
    int current;
    CUDA_CHECK(cudaGetDevice(&current));
    driver::expect(current == 0, "the guard restores the device");
    CUDA_CHECK(cudaFree(on_one));
}

// Memory that the emulator did not allocate, as a tensor's in a Python test, inside a struct of pointers.
struct Pointers {
    std::int64_t count;
    float* out;
};

__global__ void fill_struct(Pointers pointers) {
    if (threadIdx.x < pointers.count) pointers.out[threadIdx.x] = 3.f;
}

template <bool planted>
void wrong_device_of_a_tensor() {
    medaccel::emulation::set_device_count(2);
    std::vector<float> tensor(32);
    medaccel::emulation::adopt_memory(tensor.data(), tensor.size() * sizeof(float), planted ? 1 : 0);
    struct Disown {
        ~Disown() { medaccel::emulation::disown_memory(memory); }
        const void* memory;
    } disown{tensor.data()};
    LAUNCH(fill_struct, 1, 32, 0, nullptr, Pointers{32, tensor.data()});
    CUDA_CHECK(cudaDeviceSynchronize());
    driver::expect(tensor[31] == 3.f, "filled");
}

// An op hands its kernels to the caller's stream and returns.
template <bool planted>
void needless_synchronisation() {
    Stream callers;
    DeviceArray<float> out(40);
    LAUNCH(fill, dim3(2), 32, 0, callers.handle, out.data(), 40);
    if (planted) CUDA_CHECK(cudaStreamSynchronize(callers.handle));
    const auto launches = medaccel::emulation::take_launches();
    driver::expect(launches.size() == 1 && launches[0].kernel == "fill" && launches[0].grid.x == 2 &&
                       launches[0].block.x == 32 && launches[0].device == 0 && launches[0].stream == callers.handle,
                   "one launch is recorded");
    driver::expect(medaccel::emulation::synchronizations() == 0, "the host does not wait");
    CUDA_CHECK(cudaStreamSynchronize(callers.handle));
}

template <bool planted>
void stream_of_another_device() {
    medaccel::emulation::set_device_count(2);
    medaccel::DeviceGuard guard(1);
    Stream on_one;
    DeviceArray<float> out(32);
    medaccel::DeviceGuard back(planted ? 0 : 1);
    CUDA_CHECK(cudaMemsetAsync(out.data(), 0, 32 * sizeof(float), on_one.handle));
}

// The limit of a kernel's shared memory is set once, and holds for that device only.
template <bool planted>
void shared_memory_limit_of_one_device() {
    constexpr int kBytes = 100 << 10;
    medaccel::emulation::set_device_count(2);
    for (int device : {0, 1}) {
        medaccel::DeviceGuard guard(device);
        DeviceArray<float> out(32);
        if (!planted || device == 0) {
            CUDA_CHECK(
                cudaFuncSetAttribute(fill_through_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
        }
        LAUNCH(fill_through_shared, 1, 32, kBytes, nullptr, out.data());
    }
}

template <bool planted>
void empty_grid() {
    const int n = 0;
    DeviceArray<float> out(1);
    if (planted || n > 0) LAUNCH(fill, n / 32, 32, 0, nullptr, out.data(), n);
}

template <bool planted>
void earlier_error() {
    DeviceArray<float> out(32);
    if (planted) medaccel::emulation::inject_earlier_error(cudaErrorIllegalAddress);
    LAUNCH(fill, 1, 32, 0, nullptr, out.data(), 32);
}

template <bool planted>
void error_of_a_kernel_before() {  // the driver tells only at the launch
    DeviceArray<float> out(32);
    if (planted) medaccel::emulation::fail_next_launch(cudaErrorIllegalAddress);
    LAUNCH(fill, 1, 32, 0, nullptr, out.data(), 32);
}

template <bool planted>
void failing_launch() {
    DeviceArray<float> out(32);
    if (planted) medaccel::emulation::fail_next_launch(cudaErrorNoKernelImageForDevice);
    LAUNCH(fill, 1, 32, 0, nullptr, out.data(), 32);
}

template <bool planted>
void failing_call() {
    DeviceArray<float> out(32);
    if (planted) medaccel::emulation::fail_next_call(cudaErrorMemoryAllocation);
    CUDA_CHECK(cudaMemsetAsync(out.data(), 0, 32, nullptr));
}

}  // namespace

std::vector<Twins> host_bugs() {
    return {TWINS(wrong_stream),
            TWINS(default_stream),
            TWINS(wrong_device),
            TWINS(wrong_device_of_a_tensor),
            TWINS(needless_synchronisation),
            TWINS(stream_of_another_device),
            TWINS(shared_memory_limit_of_one_device),
            TWINS(empty_grid),
            TWINS(earlier_error),
            TWINS(error_of_a_kernel_before),
            TWINS(failing_launch),
            TWINS(failing_call)};
}
