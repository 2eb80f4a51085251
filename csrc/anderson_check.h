// What the compiled forms of anderson_mix ask of their arguments, the same on the CPU and the GPU.
// Cheap checks: strides are free, values are not looked at.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace fastdeq {

inline void check_anderson_mix(const at::Tensor& f_history, const at::Tensor& g_history,
                               const at::Tensor& gram, const at::Tensor& count, int64_t slot) {
  TORCH_CHECK(f_history.dim() == 3 && f_history.sizes() == g_history.sizes(),
              "anderson_mix: f_history and g_history must both be (B, m, n), got ",
              f_history.sizes(), " and ", g_history.sizes());
  const int64_t batch = f_history.size(0), slots = f_history.size(1);
  TORCH_CHECK(
      gram.sizes() == at::IntArrayRef({batch, slots, slots}) && gram.scalar_type() == at::kDouble,
      "anderson_mix: gram must be float64 (", batch, ", ", slots, ", ", slots, "), got ",
      gram.scalar_type(), " ", gram.sizes());
  TORCH_CHECK(count.sizes() == at::IntArrayRef({batch}) && count.scalar_type() == at::kInt,
              "anderson_mix: count must be int32 (", batch, ",), got ", count.scalar_type(), " ",
              count.sizes());
  TORCH_CHECK(f_history.scalar_type() == g_history.scalar_type(),
              "anderson_mix: f_history and g_history differ in dtype");
  TORCH_CHECK(f_history.scalar_type() == at::kFloat || f_history.scalar_type() == at::kDouble,
              "anderson_mix: the history must be float32 or float64, got ",
              f_history.scalar_type());
  TORCH_CHECK(f_history.device() == g_history.device() && f_history.device() == gram.device() &&
                  f_history.device() == count.device(),
              "anderson_mix: the tensors are on different devices");
  TORCH_CHECK(slot >= 0 && slot < slots, "anderson_mix: slot ", slot, " is not in [0, ", slots,
              ")");
}

}  // namespace fastdeq
