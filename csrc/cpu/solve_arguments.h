// The arguments of the solves: what is asked of them, and in which form the engine takes them.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "activation_names.h"
#include "solve_task.h"

namespace fastdeq {

inline int known_activation(c10::string_view name) {
  const int index = activation_index(name);
#define FASTDEQ_NAME(known, functor) " '" known "'"
  TORCH_CHECK(index >= 0, "unknown activation '", name,
              "'; valid choices:" FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_NAME));
#undef FASTDEQ_NAME
  return index;
}

inline void check_precision(c10::string_view name) {
  TORCH_CHECK(name == "auto" || name == "float32" || name == "mixed",
              "precision must be 'auto', 'float32' or 'mixed', got '", name, "'");
}

struct Method {
  bool served = false;
  Solver solver = Solver::kPlain;
  double damping = 1;
  int64_t fixed_iterations = 0;
  int64_t patience = 50;
  bool momentum = false;
  double radius = 0.5;
  int64_t most_directions = 0;
  int64_t window = 0;
  double safeguard = 0, accelerate_above = 0;
  AndersonOptions anderson{};
};

inline void check_options(c10::string_view solver, at::ArrayRef<double> options, size_t count) {
  TORCH_CHECK(options.size() == count, "solver '", solver, "' takes ", count,
              count == 1 ? " option" : " options", ", got ", options.size());
}

// The order of the options is that of the fields of the solver's dataclass.
inline Method read_method(c10::string_view solver, at::ArrayRef<double> options, int64_t max_iter) {
  TORCH_CHECK(max_iter >= 1, "max_iter is ", max_iter, " and must be >= 1");
  Method m;
  if (solver == "picard" || solver == "neumann") {
    check_options(solver, options, 2);
    m.served = true;
    m.damping = options[0];
    m.fixed_iterations = int64_t(options[1]);
    TORCH_CHECK(m.fixed_iterations >= 0, "fixed_iterations must be >= 0");
  } else if (solver == "heavy_ball") {
    check_options(solver, options, 1);
    m.served = m.momentum = true;
    m.solver = Solver::kHeavyBall;
    m.radius = options[0];
  } else if (solver == "energy") {
    check_options(solver, options, 2);
    m.served = true;
    m.solver = Solver::kEnergy;
    m.momentum = options[0] != 0;
    m.most_directions = int64_t(options[1]);
    m.patience = 200;
  } else if (solver == "minres") {
    check_options(solver, options, 1);
    m.served = true;
    m.solver = Solver::kMinres;
    m.momentum = options[0] != 0;
    m.patience = 20;
  } else if (solver == "anderson") {
    check_options(solver, options, 7);
    m.served = true;
    m.solver = Solver::kAnderson;
    TORCH_CHECK(options[0] >= 1 && options[0] <= 1e6,
                "the window of Anderson acceleration must be from 1 to 1e6, got ", options[0]);
    m.window = std::min<int64_t>(int64_t(options[0]), max_iter);  // more are never used
    m.damping = options[1];
    m.anderson = {options[1], options[2], options[3], options[4]};
    m.safeguard = options[5];
    m.accelerate_above = options[6];
  }
  return m;
}

// All on `device`.
inline void check_solve(const at::Tensor& weight, const at::Tensor& rows, const at::Tensor& other,
                        const char* name, const char* other_name,
                        at::Device device = at::Device(at::kCPU)) {
  TORCH_CHECK(rows.dim() == 2, name, " must be (B, d), got ", rows.sizes());
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({rows.size(1), rows.size(1)}),
              "weight must be (d, d) = (", rows.size(1), ", ", rows.size(1), "), got ",
              weight.sizes());
  TORCH_CHECK(!other.defined() || other.sizes() == rows.sizes(), other_name, " must be like ", name,
              ", ", rows.sizes(), ", got ", other.sizes());
  for (const at::Tensor& t : {weight, rows, other}) {
    if (!t.defined()) continue;
    TORCH_CHECK(t.is_floating_point(), "floating-point tensors are needed, got ", t.scalar_type());
    TORCH_CHECK(t.device() == device, "all tensors must be on ",
                device.is_cpu() ? "the CPU" : device.str(), ", got one on ", t.device());
  }
}

inline at::Tensor prepare(const at::Tensor& t, at::ScalarType dtype) {
  return t.to(dtype).contiguous();
}

// One of the strides must be 1.
inline at::Tensor prepare_weight(const at::Tensor& weight, at::ScalarType dtype) {
  const at::Tensor w = weight.to(dtype);
  return w.stride(0) == 1 || w.stride(1) == 1 ? w : w.contiguous();
}

inline at::ScalarType working_dtype(std::initializer_list<at::Tensor> tensors) {
  for (const at::Tensor& t : tensors) {
    if (t.defined() && t.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

}  // namespace fastdeq
