// One call of solve_affine or solve_affine_adjoint: from the operator's arguments to tensors in the
// dtype and layout that the engines take, and back to its outputs.
//
//   forward  z = phi(W z + c)      rows c, start z0
//   adjoint  q = D (g + q W)       rows g, slope D

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <string_view>

#include "common/activation_names.h"
#include "common/boxed_arguments.h"

namespace fastdeq {

struct SolveCall {
  SolveOptions options;
  int activation = -1;  // index in the table of activation_names.h; -1: adjoint
  bool with_slope = false, bitwise_symmetric = false;
  at::ScalarType result_dtype = at::kFloat;  // of the value; the rest has the working dtype

  // One of the strides of the weight is 1; rows, slope and start are (B, d), contiguous.
  at::Tensor weight, rows, slope, start;
  at::Tensor packed;  // the weight as pack_weight returns it, or undefined
  at::Tensor value, status, iterations, residual, rejects, value_slope;

  at::ScalarType dtype() const { return rows.scalar_type(); }
  int64_t batch() const { return rows.size(0); }
  int64_t size() const { return rows.size(1); }
  bool is_adjoint() const { return slope.defined(); }
  bool is_empty() const { return rows.numel() == 0; }

  // Entry (output j, input k) of the product is weight[j * output_stride + k * input_stride].
  int64_t output_stride() const { return weight.stride(is_adjoint() ? 1 : 0); }
  int64_t input_stride() const { return weight.stride(is_adjoint() ? 0 : 1); }
};

// Fills in the fields that the tasks of all engines have under the same names.
template <typename T, typename Task>
void fill_task(Task& task, SolveCall& call) {
  const auto read = [](const at::Tensor& t) {
    return t.defined() ? t.const_data_ptr<T>() : nullptr;
  };
  task.batch = call.batch();
  task.size = decltype(task.size)(call.size());
  task.weight = read(call.weight);
  task.output_stride = call.output_stride();
  task.input_stride = call.input_stride();
  task.injection = read(call.rows);
  task.slope = read(call.slope);
  task.start = read(call.start);
  task.activation = call.activation;
  task.options = call.options;
  using Limits = std::numeric_limits<T>;
  task.options.floor = kRoundingFloor * double(Limits::epsilon());
  task.options.largest_size = std::pow(double(Limits::max()), kSizeExponent);
  task.value = call.value.mutable_data_ptr<T>();
  task.status = call.status.mutable_data_ptr<int8_t>();
  task.iterations = call.iterations.mutable_data_ptr<int32_t>();
  task.residual = call.residual.mutable_data_ptr<T>();
  task.rejects = call.rejects.mutable_data_ptr<int32_t>();
  task.value_slope = call.with_slope ? call.value_slope.mutable_data_ptr<T>() : nullptr;
}

inline int known_activation(std::string_view name) {
  const int index = activation_index(name);
#define FASTDEQ_NAME(known, functor) " '" known "'"
  TORCH_CHECK(index >= 0, "unknown activation '", name,
              "'; valid choices:" FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_NAME));
#undef FASTDEQ_NAME
  return index;
}

// Checks the tensors as they were given, and puts them into the dtype and layout of SolveCall.
// `other` is the start, which may be undefined, or the slope.
inline void prepare_tensors(SolveCall& call, const char* rows_name, at::Tensor& other,
                            const char* other_name) {
  const at::Tensor &weight = call.weight, &rows = call.rows;
  TORCH_CHECK(rows.dim() == 2, rows_name, " must be (B, d), got ", rows.sizes());
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({rows.size(1), rows.size(1)}),
              "weight must be (d, d) = (", rows.size(1), ", ", rows.size(1), "), got ",
              weight.sizes());
  TORCH_CHECK(!other.defined() || other.sizes() == rows.sizes(), other_name, " must be like ",
              rows_name, ", ", rows.sizes(), ", got ", other.sizes());
  call.result_dtype = rows.scalar_type();
  at::ScalarType dtype = at::kFloat;
  for (const at::Tensor& t : {weight, rows, other}) {
    if (!t.defined()) continue;
    TORCH_CHECK(t.is_floating_point(), "floating-point tensors are needed, got ", t.scalar_type());
    TORCH_CHECK(t.device() == rows.device(), "all tensors must be on ",
                rows.is_cpu() ? "the CPU" : rows.device().str(), ", got one on ", t.device());
    if (t.scalar_type() == at::kDouble) dtype = at::kDouble;
  }
  call.weight = weight.to(dtype);
  if (weight.stride(0) != 1 && weight.stride(1) != 1) call.weight = call.weight.contiguous();
  call.rows = rows.to(dtype).contiguous();
  if (other.defined()) other = other.to(dtype).contiguous();
}

// Zeros, and so converged, where there is nothing to solve.
inline void make_outputs(SolveCall& call) {
  const at::TensorOptions options = call.rows.options();
  const auto make = [&](at::IntArrayRef sizes, at::ScalarType dtype) {
    return call.is_empty() ? at::zeros(sizes, options.dtype(dtype))
                           : at::empty(sizes, options.dtype(dtype));
  };
  const int64_t batch = call.batch();
  call.value = make(call.rows.sizes(), call.dtype());
  call.status = make({batch}, at::kChar);
  call.iterations = make({batch}, at::kInt);
  call.residual = make({batch}, call.dtype());
  call.rejects = make({batch, counters_of(call.options.solver)}, at::kInt);
  if (call.is_adjoint()) return;
  call.value_slope = make(call.with_slope ? call.rows.sizes() : at::IntArrayRef({0}), call.dtype());
}

inline SolveCall read_forward(BoxedArguments& arguments) {
  SolveCall call;
  call.weight = arguments.tensor("weight");
  call.rows = arguments.tensor("injection");
  call.start = arguments.optional_tensor("start");
  call.activation = known_activation(arguments.text("activation"));
  call.with_slope = arguments.flag("with_slope");
  call.packed = arguments.optional_tensor("packed");
  call.bitwise_symmetric = arguments.flag("bitwise_symmetric");
  call.options = read_options(arguments);
  prepare_tensors(call, "injection", call.start, "start");
  make_outputs(call);
  return call;
}

inline SolveCall read_adjoint(BoxedArguments& arguments) {
  SolveCall call;
  call.weight = arguments.tensor("weight");
  call.slope = arguments.tensor("slope");
  call.rows = arguments.tensor("grad");
  call.packed = arguments.optional_tensor("packed");
  call.bitwise_symmetric = arguments.flag("bitwise_symmetric");
  call.options = read_options(arguments);
  prepare_tensors(call, "grad", call.slope, "slope");
  make_outputs(call);
  return call;
}

inline void return_forward(BoxedArguments& arguments, const SolveCall& call) {
  arguments.replace_by(call.value.to(call.result_dtype), call.status, call.iterations,
                       call.residual, call.rejects, call.value_slope);
}

inline void return_adjoint(BoxedArguments& arguments, const SolveCall& call) {
  arguments.replace_by(call.value.to(call.result_dtype), call.status, call.iterations,
                       call.residual, call.rejects);
}

}  // namespace fastdeq
