// SPDX-License-Identifier: Apache-2.0
// kernel<<<grid, block, shared, stream>>>(arguments...), emulated.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "fault.h"
#include "runtime_api.h"
#include "sanitizers.h"
#include "vector_types.h"

namespace medaccel::emulation {

struct LaunchRequest {
    const char* kernel_name;
    const void* kernel;
    Site site;
    dim3 grid, block;
    std::size_t dynamic_shared_bytes;
    cudaStream_t stream;
};

struct Bytes {
    const void* begin;
    std::size_t count;
};

// Makes the checks that the driver makes, then runs body() once for each thread. `parameters` are searched
// for pointers to another device's memory.
void launch(const LaunchRequest& request, const std::vector<Bytes>& parameters, std::function<void()> body);

template <class... P, class... A>
void launch_kernel(const char* name, Site site, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, A... arguments) {
    static_assert(((std::is_trivially_copyable_v<P> && !std::is_reference_v<P>) && ...),
                  "a kernel's parameters are copied to the device byte by byte");
    static_assert((sizeof(P) + ... + 0) <= 4096, "a kernel's parameters take at most 4096 bytes");
    Unobserved scope;
    // On the heap: without a synchronisation nothing orders the threads' reads before the host's next use of its
    // stack.
    const auto parameters = std::make_unique<const std::tuple<P...>>(arguments...);
    const auto bytes =
        std::apply([](const P&... p) { return std::vector<Bytes>{Bytes{&p, sizeof p}...}; }, *parameters);
    launch({name, reinterpret_cast<const void*>(kernel), site, grid, block, shared_bytes, stream}, bytes,
           [kernel, from = parameters.get()] { std::apply(kernel, *from); });
}

}  // namespace medaccel::emulation
