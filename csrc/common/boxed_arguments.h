// The arguments of a boxed operator call, read by the names that its schema gives them.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>

#include "common/solve_options.h"

namespace fastdeq {

class BoxedArguments {
 public:
  BoxedArguments(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op), schema_(op.schema().arguments()), stack_(stack) {}

  const at::Tensor& tensor(std::string_view name) { return (*this)[name].toTensor(); }
  // Undefined for None.
  at::Tensor optional_tensor(std::string_view name) {
    const c10::IValue& value = (*this)[name];
    return value.isNone() ? at::Tensor() : value.toTensor();
  }
  std::string_view text(std::string_view name) { return (*this)[name].toStringView(); }
  double number(std::string_view name) { return (*this)[name].toDouble(); }
  bool flag(std::string_view name) { return (*this)[name].toBool(); }
  // Counts beyond the range of int32 are as good as its end.
  int32_t count(std::string_view name, int64_t least) {
    const int64_t value = (*this)[name].toInt();
    TORCH_CHECK(value >= least, name, " is ", value, " and must be >= ", least);
    return int32_t(std::min<int64_t>(value, std::numeric_limits<int32_t>::max() - 1));
  }

  // Whether the call asks for this engine. Any other is for Python, which leaves its outputs in the
  // place of the arguments.
  bool are_for(std::string_view engine) {
    if (text("engine") == engine) return true;
    op_.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack_);
    return false;
  }

  // Puts the outputs in the place of the arguments, which are gone then.
  template <typename... Outputs>
  void replace_by(Outputs&&... outputs) {
    torch::jit::drop(stack_, schema_.size());
    torch::jit::push(stack_, std::forward<Outputs>(outputs)...);
  }

 private:
  // They are mostly asked for in their order: the search begins after the one before.
  const c10::IValue& operator[](std::string_view name) {
    const size_t count = schema_.size();
    for (size_t i = 0; i < count; ++i) {
      const size_t index = next_ + i < count ? next_ + i : next_ + i - count;
      if (schema_[index].name() != name) continue;
      next_ = index + 1;
      return torch::jit::peek(stack_, index, count);
    }
    TORCH_CHECK(false, op_.schema().name(), " has no argument '", name, "'");
  }

  const c10::OperatorHandle& op_;
  const std::vector<c10::Argument>& schema_;
  torch::jit::Stack& stack_;
  size_t next_ = 0;
};

inline Solver known_solver(std::string_view name) {
  if (name == "picard" || name == "neumann") return Solver::kPlain;
  if (name == "anderson") return Solver::kAnderson;
  if (name == "heavy_ball") return Solver::kHeavyBall;
  if (name == "energy") return Solver::kEnergy;
  if (name == "minres") return Solver::kMinres;
  TORCH_CHECK(false, "the compiled engines have no solver '", name, "'");
}

inline Precision known_precision(std::string_view name) {
  if (name == "auto") return Precision::kAuto;
  if (name == "float32") return Precision::kFloat32;
  if (name == "mixed") return Precision::kMixed;
  TORCH_CHECK(false, "precision must be 'auto', 'float32' or 'mixed', got '", name, "'");
}

inline SolveOptions read_options(BoxedArguments& arguments) {
  SolveOptions o;
  o.solver = known_solver(arguments.text("solver"));
  o.tol = arguments.number("tol");
  o.max_iter = arguments.count("max_iter", 1);
  o.patience = arguments.count("patience", 1);
  o.atol = arguments.number("atol");
  o.precision = known_precision(arguments.text("precision"));
  o.damping = arguments.number("damping");
  o.fixed_iterations = arguments.count("fixed_iterations", 0);
  o.momentum = arguments.flag("momentum");
  o.radius = arguments.number("radius");
  o.most_directions = arguments.count("most_directions", 0);
  if (o.solver == Solver::kAnderson) {
    constexpr int32_t kLargestWindow = 1'000'000;
    o.window = arguments.count("window", 1);
    TORCH_CHECK(o.window <= kLargestWindow, "window is ", o.window,
                " and must be <= ", kLargestWindow);
    o.window = std::min(o.window, o.updates());  // more are never used
    o.first_window = arguments.count("first_window", 0);
  }
  o.regularization = arguments.number("regularization");
  o.rank_tolerance = arguments.number("rank_tolerance");
  o.max_weight = arguments.number("max_weight");
  o.safeguard = arguments.number("safeguard");
  o.accelerate_above = arguments.number("accelerate_above");
  o.min_iter = arguments.count("min_iter", 0);
  return o;
}

}  // namespace fastdeq
