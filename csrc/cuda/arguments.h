// The solves of an affine cell on a GPU: from the operator's arguments to what a kernel reads, and
// back. Everything is enqueued on the current stream; nothing waits for the device.
//
//   forward  z = phi(W z + c)      offset c
//   adjoint  q = D (g + q W)       offset g, in rows with |D g| = 1
//
//   CudaSolve solve = forward_solve(weight, injection, start, ...);
//   ... kernels on solve.pointers<T>() ...
//   return forward_outputs(solve, injection.scalar_type());

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../cpu/solve_arguments.h"
#include "launch.h"
#include "rows.cuh"
#include "sample.cuh"

namespace fastdeq {

using Forward =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Adjoint = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// While it lives, what is called is neither recorded for gradients nor autocast.
struct PlainOperations {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// The same solve on the device: rows are (batch, size), contiguous. T is float or double.
template <typename T>
struct SolvePointers {
  int64_t batch, size;
  const T* weight;  // entry (output j, input k) at j * output_stride + k * input_stride
  int64_t output_stride, input_stride;
  const T* offset;
  const T* slope;  // D; null: forward
  const T* start;  // finite; null: zeros
  T* value;
  int8_t* status;
  int32_t* iterations;
  T* residual;
  int32_t* rejects;  // (batch, counters); null where there are none
  T* value_slope;    // null: not wanted
};

struct CudaSolve {
  Method method;
  int activation = -1;  // index in the table of activation_names.h; -1: adjoint
  double tol = 0;
  int64_t max_iter = 0;
  bool fixed = false;  // exactly max_iter updates, and no stop test

  // In the working dtype. A product is rows @ factor: W^T forward, W in the adjoint. One of its
  // strides is 1, the other at least its size.
  at::Tensor factor, offset, slope, start;
  at::Tensor value, status, iterations, residual, rejects, value_slope;

  at::Tensor norm, largest;  // adjoint: (B, 1), what the solution is multiplied by

  at::ScalarType dtype() const { return offset.scalar_type(); }
  int64_t batch() const { return offset.size(0); }
  int64_t size() const { return offset.size(1); }
  int counters() const { return counters_of(method.solver); }

  // `ramp`: with narrow products where they do no harm.
  cuda::SolveOptions options(bool ramp) const {
    cuda::SolveOptions o;
    o.tol = tol;
    o.max_iter = int32_t(max_iter);
    o.fixed = fixed;
    o.patience = int32_t(method.patience);
    o.damping = method.damping;
    o.momentum = method.momentum;
    o.radius = method.radius;
    o.window = int32_t(method.window);
    o.safeguard = method.safeguard;
    o.accelerate_above = method.accelerate_above;
    o.anderson = method.anderson;
    o.ramp = ramp;
    return o;
  }

  template <typename T>
  SolvePointers<T> pointers() {
    const auto read = [](const at::Tensor& t) {
      return t.defined() ? t.const_data_ptr<T>() : nullptr;
    };
    return {
        .batch = batch(),
        .size = size(),
        .weight = read(factor),
        .output_stride = factor.stride(1),
        .input_stride = factor.stride(0),
        .offset = read(offset),
        .slope = read(slope),
        .start = read(start),
        .value = value.mutable_data_ptr<T>(),
        .status = status.mutable_data_ptr<int8_t>(),
        .iterations = iterations.mutable_data_ptr<int32_t>(),
        .residual = residual.mutable_data_ptr<T>(),
        .rejects = counters() > 0 ? rejects.mutable_data_ptr<int32_t>() : nullptr,
        .value_slope = value_slope.numel() > 0 ? value_slope.mutable_data_ptr<T>() : nullptr,
    };
  }
};

namespace arguments {

// A matrix that the library multiplies by without copying it first.
inline at::Tensor prepare_factor(const at::Tensor& matrix, at::ScalarType dtype) {
  const at::Tensor m = matrix.to(dtype);
  const int64_t least = std::max<int64_t>(m.size(0), 1);
  const bool rows = m.stride(1) == 1 && m.stride(0) >= least;
  const bool columns = m.stride(0) == 1 && m.stride(1) >= least;
  return rows || columns ? m : m.contiguous();
}

inline void set_method(CudaSolve& solve, c10::string_view solver, at::ArrayRef<double> options,
                       double tol, int64_t max_iter) {
  solve.method = read_method(solver, options, max_iter);
  const Solver kind = solve.method.solver;
  TORCH_CHECK(solve.method.served && (kind == Solver::kPlain || kind == Solver::kAnderson ||
                                      kind == Solver::kHeavyBall),
              "the CUDA engines have no solver '", solver,
              "'; they have 'picard', 'neumann', 'anderson', 'heavy_ball'");
  solve.tol = tol;
  solve.fixed = solve.method.fixed_iterations > 0;
  solve.max_iter = std::min<int64_t>(solve.fixed ? solve.method.fixed_iterations : max_iter,
                                     std::numeric_limits<int32_t>::max() - 1);
}

inline void make_outputs(CudaSolve& solve, bool with_slope) {
  const at::TensorOptions options = solve.offset.options();
  const int64_t batch = solve.batch();
  solve.value = at::empty(solve.offset.sizes(), options);
  solve.status = at::empty({batch}, options.dtype(at::kChar));
  solve.iterations = at::empty({batch}, options.dtype(at::kInt));
  solve.residual = at::empty({batch}, options);
  solve.rejects = at::empty({batch, solve.counters()}, options.dtype(at::kInt));
  solve.value_slope =
      with_slope ? at::empty(solve.offset.sizes(), options) : at::empty({0}, options);
}

// The gradient in unit rows; see rows.cuh.
template <typename T>
void scale_gradient(CudaSolve& solve, const at::Tensor& grad) {
  solve.norm = at::empty({grad.size(0), 1}, grad.options());
  solve.largest = at::empty_like(solve.norm);
  solve.offset = at::empty(grad.sizes(), grad.options());
  const Launch launch(grad);
  cuda::scale_rows(solve.slope.const_data_ptr<T>(), grad.const_data_ptr<T>(), grad.size(0),
                   grad.size(1), solve.offset.mutable_data_ptr<T>(),
                   solve.norm.mutable_data_ptr<T>(), solve.largest.mutable_data_ptr<T>(),
                   launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The solution in the scale of the gradient, in its own place.
template <typename T>
void restore_scale(const CudaSolve& solve) {
  T* const value = solve.value.mutable_data_ptr<T>();
  const Launch launch(solve.value);
  cuda::restore_rows(value, solve.norm.const_data_ptr<T>(), solve.largest.const_data_ptr<T>(),
                     solve.batch(), solve.size(), value, launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace arguments

// `injection` has at least one entry; see `by_reference`.
inline CudaSolve forward_solve(const at::Tensor& weight, const at::Tensor& injection,
                               const std::optional<at::Tensor>& start, c10::string_view activation,
                               c10::string_view solver, at::ArrayRef<double> options, double tol,
                               int64_t max_iter, c10::string_view precision, bool slope) {
  check_precision(precision);
  CudaSolve solve;
  arguments::set_method(solve, solver, options, tol, max_iter);
  const at::Tensor given = start.value_or(at::Tensor());
  check_solve(weight, injection, given, "injection", "start", injection.device());
  const at::ScalarType dtype = working_dtype({weight, injection, given});
  solve.activation = known_activation(activation);
  solve.factor = arguments::prepare_factor(weight, dtype).t();
  solve.offset = prepare(injection, dtype);
  if (given.defined()) {
    const at::Tensor z0 = prepare(given, dtype);
    solve.start = at::where(at::isfinite(z0).all(1, true), z0, 0);
  }
  arguments::make_outputs(solve, slope);
  return solve;
}

inline Forward forward_outputs(const CudaSolve& solve, at::ScalarType dtype) {
  const at::Tensor packed = at::empty({0}, solve.offset.options().dtype(at::kByte));
  return {solve.value.to(dtype), solve.status, solve.iterations, solve.residual, solve.rejects,
          solve.value_slope,     packed};
}

inline CudaSolve adjoint_solve(const at::Tensor& weight, const at::Tensor& slope,
                               const at::Tensor& grad, c10::string_view solver,
                               at::ArrayRef<double> options, double tol, int64_t max_iter,
                               c10::string_view precision) {
  check_precision(precision);
  CudaSolve solve;
  arguments::set_method(solve, solver, options, tol, max_iter);
  check_solve(weight, grad, slope, "grad", "slope", grad.device());
  const at::ScalarType dtype = working_dtype({weight, slope, grad});
  solve.factor = arguments::prepare_factor(weight, dtype);
  solve.slope = prepare(slope, dtype);
  const at::Tensor g = prepare(grad, dtype);
  dtype == at::kDouble ? arguments::scale_gradient<double>(solve, g)
                       : arguments::scale_gradient<float>(solve, g);
  arguments::make_outputs(solve, false);
  return solve;
}

// Puts the solution back into the scale of the gradient.
inline Adjoint adjoint_outputs(const CudaSolve& solve, at::ScalarType dtype) {
  solve.dtype() == at::kDouble ? arguments::restore_scale<double>(solve)
                               : arguments::restore_scale<float>(solve);
  return {solve.value.to(dtype), solve.status, solve.iterations, solve.residual, solve.rejects};
}

// Empty batches and states, and nothing else.
template <typename Op, typename... Arguments>
auto by_reference(Op*, const char* name, const Arguments&... arguments) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>().call(arguments...);
}

}  // namespace fastdeq
