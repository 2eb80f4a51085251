// A weight in the order in which the products of the CPU engine read it, as one buffer that both
// directions of a solve with a symmetric weight can share.
//
// Specification: fastdeq/ops/pack_weight.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/boxed_arguments.h"
#include "cpu/packed_weight.h"

namespace fastdeq {
namespace {

// Multiply-adds from which on threads share the packing.
constexpr int64_t kSharedPacking = int64_t(1) << 16;

at::Tensor pack_weight(const at::Tensor& weight, c10::string_view precision) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == weight.size(1), "weight must be (d, d), got ",
              weight.sizes());
  TORCH_CHECK(weight.is_floating_point(), "a floating-point weight is needed, got ",
              weight.scalar_type());
  const Precision wanted = known_precision(precision);
  at::Tensor w = weight.to(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (w.stride(0) != 1 && w.stride(1) != 1) w = w.contiguous();
  const int64_t size = w.size(0);
  at::Tensor packed = at::empty({packed_bytes(size)}, w.options().dtype(at::kByte));
  auto* const at_packed = static_cast<std::byte*>(packed.mutable_data_ptr());
  *reinterpret_cast<PackedHeader*>(at_packed) = {};
  if (size == 0) return packed;
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "pack_weight", [&] {
    SolveTask<scalar_t> task;
    task.size = size;
    task.weight = w.const_data_ptr<scalar_t>();
    task.output_stride = w.stride(0);
    task.input_stride = w.stride(1);
    task.low_precision = uses_low_precision<scalar_t>(size, wanted);
    place_packed(task, at_packed, engine_for<scalar_t>().padded(size));
    pack_all(task, size * size >= kSharedPacking && available_threads() > 1);
    *reinterpret_cast<PackedHeader*>(at_packed) = packed_header(task);
  });
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CPU, m) { m.impl("pack_weight", &pack_weight); }

}  // namespace fastdeq
