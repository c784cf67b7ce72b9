// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime functions that medaccel uses, by their own names; runtime.cpp defines them. What is not
// here does not compile. Devices have the limits of sm_80, the smallest GPU that is supported.
#pragma once

#include <cstddef>

#include "fault.h"

#define MEDACCEL_EMU_SITE \
    ::medaccel::emulation::Site site = ::medaccel::emulation::Site::here(__builtin_FILE(), __builtin_LINE())

#define MEDACCEL_EMU_ERRORS(ERROR)              \
    ERROR(cudaSuccess, 0)                       \
    ERROR(cudaErrorInvalidValue, 1)             \
    ERROR(cudaErrorMemoryAllocation, 2)         \
    ERROR(cudaErrorInvalidConfiguration, 9)     \
    ERROR(cudaErrorNoDevice, 100)               \
    ERROR(cudaErrorInvalidDevice, 101)          \
    ERROR(cudaErrorNoKernelImageForDevice, 209) \
    ERROR(cudaErrorECCUncorrectable, 214)       \
    ERROR(cudaErrorInvalidResourceHandle, 400)  \
    ERROR(cudaErrorIllegalAddress, 700)         \
    ERROR(cudaErrorLaunchTimeout, 702)          \
    ERROR(cudaErrorAssert, 710)                 \
    ERROR(cudaErrorHardwareStackError, 714)     \
    ERROR(cudaErrorIllegalInstruction, 715)     \
    ERROR(cudaErrorMisalignedAddress, 716)      \
    ERROR(cudaErrorInvalidAddressSpace, 717)    \
    ERROR(cudaErrorInvalidPc, 718)              \
    ERROR(cudaErrorLaunchFailure, 719)

enum cudaError_t {
#define MEDACCEL_EMU_ERROR(name, code) name = code,
    MEDACCEL_EMU_ERRORS(MEDACCEL_EMU_ERROR)
#undef MEDACCEL_EMU_ERROR
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
// In the emulator's own words: what was wrong, not only its kind.
const char* cudaGetErrorString(cudaError_t error);

enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();

enum cudaMemcpyKind {
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4,
};

cudaError_t cudaMalloc(void** memory, std::size_t bytes);  // filled with NaN: an element nobody wrote shows
template <class T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, MEDACCEL_EMU_SITE);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                            MEDACCEL_EMU_SITE);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream, MEDACCEL_EMU_SITE);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// The versions of the code that would run, as 10·major + minor; the emulator runs none, and says 0.
struct cudaFuncAttributes {
    int binaryVersion;
    int ptxVersion;
};

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
    return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
