// SPDX-License-Identifier: Apache-2.0
// Makes a torch that was built for the CPU alone believe in a GPU without memory, stream or kernel: tensors that have
// no memory either (FakeTensorMode) can then lie on "cuda", require gradients and run backward. Loaded before torch
// is imported, since torch looks for a GPU's hooks once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
namespace {

struct Hooks final : CUDAHooksInterface {
    explicit Hooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

// The only stream is the default one, and nothing ever runs in it.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
    Device exchangeDevice(Device) const override { return getDevice(); }
    c10::Stream getStream(Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace
}  // namespace at
