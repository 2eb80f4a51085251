// Looks at a number on the device without waiting for it: asks for a copy in pinned memory, and
// reads that when it has come.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

namespace fastdeq {

// How many samples still run.
class Lookout {
 public:
  // The int32 at `offset` of `bytes` on the device.
  Lookout(const at::Tensor& bytes, size_t offset)
      : running_(bytes.view(at::kInt).narrow(0, int64_t(offset / sizeof(int32_t)), 1)),
        seen_(at::empty({1}, running_.options().device(at::kCPU).pinned_memory(true))) {
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  }
  Lookout(const Lookout&) = delete;
  Lookout& operator=(const Lookout&) = delete;
  ~Lookout() { C10_CUDA_CHECK_WARN(cudaEventDestroy(event_)); }

  // False when the device was known to be done; asks again.
  bool any(cudaStream_t stream) {
    if (asked_) {
      const cudaError_t error = cudaEventQuery(event_);
      if (error == cudaErrorNotReady) {
        [[maybe_unused]] const auto cleared = cudaGetLastError();
        return true;
      }
      C10_CUDA_CHECK(error);
      if (*seen_.const_data_ptr<int32_t>() == 0) return false;
    }
    seen_.copy_(running_, /*non_blocking=*/true);
    C10_CUDA_CHECK(cudaEventRecord(event_, stream));
    asked_ = true;
    return true;
  }

 private:
  const at::Tensor running_, seen_;
  cudaEvent_t event_ = nullptr;
  bool asked_ = false;
};

}  // namespace fastdeq
