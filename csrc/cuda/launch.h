// What every kernel launch needs: the device of its tensors, PyTorch's stream there, and a check.
//
//   const Launch launch(z);
//   kernel<<<grid, block, shared, launch.stream>>>(...);
//   C10_CUDA_KERNEL_LAUNCH_CHECK();

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <mutex>

namespace fastdeq {

// What the choice of a grid depends on.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_per_block = 0;  // bytes, where the kernel asks for more than 48 KiB
  int major = 0, minor = 0;  // compute capability
  bool cooperative = false;  // launches whose blocks may wait for each other
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline DeviceLimits query_device_limits(int device) {
  return {
      .multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device),
      .shared_per_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      .major = device_attribute(cudaDevAttrComputeCapabilityMajor, device),
      .minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device),
      .cooperative = device_attribute(cudaDevAttrCooperativeLaunch, device) != 0,
  };
}

// Asked of the driver once for each device.
inline const DeviceLimits& device_limits(int device) {
  static std::array<std::once_flag, C10_COMPILE_TIME_MAX_GPUS> asked;
  static std::array<DeviceLimits, C10_COMPILE_TIME_MAX_GPUS> limits;
  std::call_once(asked.at(device), [=] { limits[device] = query_device_limits(device); });
  return limits[device];
}

// While it lives, the device of `tensor` is the current one: a kernel launches on the current
// device, which need not be the one that holds the tensors.
struct Launch {
  explicit Launch(const at::Tensor& tensor)
      : guard(tensor.device()),
        stream(c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream()),
        limits(device_limits(tensor.get_device())) {}

  const c10::cuda::CUDAGuard guard;
  const cudaStream_t stream;
  const DeviceLimits& limits;
};

// What a block may have without asking.
constexpr size_t kSharedUnasked = 48 * 1024;

// Lets `kernel` have `bytes` of dynamic shared memory on the current device. Once is enough, but
// asking again costs little next to a solve.
template <typename Kernel>
void raise_shared_limit(Kernel* kernel, size_t bytes, const DeviceLimits& limits) {
  if (bytes <= kSharedUnasked) return;
  TORCH_CHECK(bytes <= size_t(limits.shared_per_block), "a block needs ", bytes,
              " bytes of shared memory, this device has ", limits.shared_per_block);
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

}  // namespace fastdeq
