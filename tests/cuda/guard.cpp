// Device guards for CUDA and MPS in a PyTorch that was built without them: enough for FakeTensors to live there, index
// and mix with Python numbers, and for a current device to exist. Nothing is computed and no memory is taken.
// Built by pretended.py; the number of devices is set through `pretend_devices`.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
c10::DeviceIndex devices = 1;

template <c10::DeviceType kind>
struct PretendedGuard final : c10::impl::DeviceGuardImplInterface {
  static thread_local c10::DeviceIndex current;

  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = current;
    current = device.index();
    return {kind, before};
  }
  c10::Device getDevice() const override { return {kind, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }
};

template <c10::DeviceType kind>
thread_local c10::DeviceIndex PretendedGuard<kind>::current = 0;

using PretendedCuda = PretendedGuard<c10::DeviceType::CUDA>;
using PretendedMps = PretendedGuard<c10::DeviceType::MPS>;
}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, PretendedCuda)
C10_REGISTER_GUARD_IMPL(MPS, PretendedMps)

extern "C" void pretend_devices(int count) { devices = static_cast<c10::DeviceIndex>(count); }
extern "C" int pretended_current() { return PretendedCuda::current; }
extern "C" void pretend_current(int index) { PretendedCuda::current = static_cast<c10::DeviceIndex>(index); }
