// What every kernel launch needs: the device of its tensors, PyTorch's stream there, and a check.
//
//   const Launch launch(z);
//   kernel<<<grid, block, shared, launch.stream>>>(...);
//   C10_CUDA_KERNEL_LAUNCH_CHECK();

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace fastdeq {

// While it lives, the device of `tensor` is the current one: a kernel launches on the current
// device, which need not be the one that holds the tensors.
struct Launch {
  explicit Launch(const at::Tensor& tensor)
      : guard(tensor.device()),
        stream(c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream()) {}

  const c10::cuda::CUDAGuard guard;
  const cudaStream_t stream;
};

}  // namespace fastdeq
