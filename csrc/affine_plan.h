// What stays from call to call of an affine solve, and which calls it is for; see affine_node.cpp.

#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/SafePyObject.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace fastdeq {

namespace py = pybind11;

// A Python object that may be released on a thread without the interpreter's lock.
inline c10::SafePyObject hold(py::handle object) {
  return {object.inc_ref().ptr(), getPyInterpreter()};
}

inline py::object borrow(const c10::SafePyObject& held) {
  return py::reinterpret_borrow<py::object>(held.ptr(getPyInterpreter()));
}

inline py::object to_python(const at::Tensor& t) {
  return t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none();
}

inline at::Tensor to_tensor(py::handle object) {
  return object.is_none() ? at::Tensor() : THPVariable_Unpack(object.ptr());
}

// What an operator returned, until somebody reads it.
struct __attribute__((visibility("hidden"))) SolveOutputs {
  std::vector<at::Tensor> tensors;
  py::object spec, contraction;

  py::tuple unpack() const {
    py::tuple all(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) all[i] = to_python(tensors[i]);
    return all;
  }
};

inline bool any_failed(const at::Tensor& status) {
  const int8_t* const at = status.const_data_ptr<int8_t>();
  int8_t seen = 0;
  for (int64_t i = 0; i < status.numel(); ++i) seen |= at[i];
  return seen != 0;
}

// An operator with the arguments that stay from call to call.
class PreparedCall {
 public:
  // `options` are the last arguments of the schema.
  PreparedCall(const char* name, const py::tuple& options)
      : op_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "")) {
    const auto& arguments = op_.schema().arguments();
    const size_t first = arguments.size() - options.size();
    for (size_t i = 0; i < options.size(); ++i) {
      const py::object value = options[i];
      switch (arguments[first + i].type()->kind()) {
        case c10::TypeKind::StringType:
          tail_.emplace_back(py::cast<std::string>(value));
          break;
        case c10::TypeKind::FloatType:
          tail_.emplace_back(py::cast<double>(value));
          break;
        case c10::TypeKind::BoolType:
          tail_.emplace_back(py::cast<bool>(value));
          break;
        default:
          tail_.emplace_back(py::cast<int64_t>(value));
      }
    }
  }

  std::vector<at::Tensor> operator()(std::initializer_list<c10::IValue> first) const {
    torch::jit::Stack stack;
    stack.reserve(first.size() + tail_.size());
    stack.insert(stack.end(), first);
    stack.insert(stack.end(), tail_.begin(), tail_.end());
    op_.callBoxed(stack);
    std::vector<at::Tensor> outputs;
    outputs.reserve(stack.size());
    for (c10::IValue& value : stack) outputs.push_back(std::move(value).toTensor());
    return outputs;
  }

 private:
  c10::OperatorHandle op_;
  torch::jit::Stack tail_;
};

// Nobody listens to single operations or changes what they mean: no mode, transform or tracer.
inline bool is_plain_context() {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  return (here.included_.raw_repr() & ~c10::default_included_set.raw_repr()) == 0 &&
         here.excluded_.has(c10::DispatchKey::AutocastCPU) &&
         !at::impl::torch_function_mode_enabled();
}

inline bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::AutocastCPU});
  return (t.key_set().raw_repr() & ~kPlain.raw_repr()) == 0 && !t._fw_grad(0).defined();
}

// Whether no exponent consists of ones alone.
template <typename T, typename Bits>
bool is_finite(const at::Tensor& x, Bits exponent) {
  const T* const at = x.const_data_ptr<T>();
  const int64_t rows = x.size(0), columns = x.size(1), down = x.stride(0), right = x.stride(1);
  Bits bad = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* const row = at + i * down;
    const auto look = [&](int64_t step) {
      for (int64_t j = 0; j < columns; ++j) {
        Bits bits;
        std::memcpy(&bits, row + j * step, sizeof bits);
        bad |= Bits((bits & exponent) == exponent);
      }
    };
    right == 1 ? look(1) : look(right);  // the first is vectorised
  }
  return bad == 0;
}

class AffinePlan {
 public:
  AffinePlan(int64_t size, py::handle dtype, std::string activation, const py::tuple& forward,
             const std::optional<py::tuple>& adjoint, py::handle forward_spec,
             py::handle adjoint_spec, py::handle contraction, py::handle backward)
      : size(size),
        dtype(reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type),
        activation(std::move(activation)),
        forward("fastdeq::solve_affine", forward),
        forward_spec(hold(forward_spec)),
        adjoint_spec(hold(adjoint_spec)),
        contraction(hold(contraction)),
        backward(hold(backward)) {
    if (adjoint) this->adjoint.emplace("fastdeq::solve_affine_adjoint", *adjoint);
  }

  // Whether the tensors are such as this plan is for.
  bool fits(const at::Tensor& weight, const at::Tensor& x, const at::Tensor& input_weight,
            const at::Tensor& bias, const at::Tensor& start) const {
    const auto suits = [&](const at::Tensor& t) {
      return is_plain(t) && t.scalar_type() == dtype && t.layout() == at::kStrided;
    };
    if (!suits(weight) || !suits(x) || !suits(input_weight)) return false;
    if (bias.defined() && !(suits(bias) && bias.dim() == 1 && bias.size(0) == size)) return false;
    if (x.dim() != 2 || input_weight.dim() != 2 || x.size(0) == 0) return false;
    if (start.defined() && !(suits(start) && start.sizes() == at::IntArrayRef({x.size(0), size}))) {
      return false;
    }
    return weight.sizes() == at::IntArrayRef({size, size}) &&
           input_weight.sizes() == at::IntArrayRef({size, x.size(1)}) &&
           (dtype == at::kFloat ? is_finite<float, uint32_t>(x, 0x7f800000u)
                                : is_finite<double, uint64_t>(x, 0x7ff0000000000000u));
  }

  const int64_t size;
  const at::ScalarType dtype;
  const std::string activation;
  const PreparedCall forward;
  std::optional<PreparedCall> adjoint;  // none where no gradient is wanted
  const c10::SafePyObject forward_spec, adjoint_spec, contraction, backward;
};

using PlanPointer = std::shared_ptr<const AffinePlan>;

}  // namespace fastdeq
