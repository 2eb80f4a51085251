// The solve of a plain affine cell as one node of the autograd graph: z = phi(W z + U x + b).
//
// The time of a small solve is the time of what surrounds it, so all of that is here in one call:
// the checks of the input, c = U x + b, the operator, the copy that is returned, the node. The
// backward pass is one call of the adjoint's operator and the products of
//
//   dL/dW = q^T z,  dL/dx = q U,  dL/dU = q^T x,  dL/db = sum of the rows of q
//
// in the arithmetic of autograd's own nodes. Whatever is unusual is left to Python, which can do
// everything (fastdeq/solve/autograd.py): the call returns None for subclasses, modes, autocast and
// transforms, for other devices and dtypes and for input that does not fit or is not finite; the
// node asks Python for gradients that are to be differentiated again or that are batched.
// What a solve reports is kept as tensors, and becomes a Solution when it is read.

#include "affine_node.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstring>
#include <optional>
#include <string>

namespace py = pybind11;

namespace fastdeq {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::Variable;
using torch::autograd::variable_list;
// A shared_ptr, or from some version of PyTorch on an intrusive one.
using NodePointer = std::decay_t<decltype(std::declval<const Variable&>().grad_fn())>;

template <typename Pointer, typename Own, typename... Arguments>
auto make_node(Own*& node, Arguments&&... arguments) {
  node = new Own(std::forward<Arguments>(arguments)...);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(node, [](auto* old) { deleteNode(old); });  // not by recursion
  } else {
    return Pointer::unsafe_steal_from_new(node);
  }
}

// A Python object that may be released on a thread without the interpreter's lock.
c10::SafePyObject hold(py::handle object) { return {object.inc_ref().ptr(), getPyInterpreter()}; }

py::object borrow(const c10::SafePyObject& held) {
  return py::reinterpret_borrow<py::object>(held.ptr(getPyInterpreter()));
}

py::object to_python(const at::Tensor& t) {
  return t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none();
}

at::Tensor to_tensor(py::handle object) {
  return object.is_none() ? at::Tensor() : THPVariable_Unpack(object.ptr());
}

// What an operator returned, until somebody reads it.
struct SolveOutputs {
  variable_list tensors;
  py::object spec, contraction;
  bool failed = false;  // for some sample: its status is not CONVERGED

  py::tuple unpack() const {
    py::tuple all(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) all[i] = to_python(tensors[i]);
    return all;
  }
};

bool any_failed(const at::Tensor& status) {
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

  variable_list operator()(std::initializer_list<c10::IValue> first) const {
    torch::jit::Stack stack;
    stack.reserve(first.size() + tail_.size());
    stack.insert(stack.end(), first);
    stack.insert(stack.end(), tail_.begin(), tail_.end());
    op_.callBoxed(stack);
    variable_list outputs;
    outputs.reserve(stack.size());
    for (c10::IValue& value : stack) outputs.push_back(std::move(value).toTensor());
    return outputs;
  }

 private:
  c10::OperatorHandle op_;
  torch::jit::Stack tail_;
};

// Nobody listens to single operations or changes what they mean: no mode, transform or tracer.
bool is_plain_context() {
  const auto here = c10::impl::tls_local_dispatch_key_set();
  return (here.included_.raw_repr() & ~c10::default_included_set.raw_repr()) == 0 &&
         here.excluded_.has(c10::DispatchKey::AutocastCPU) &&
         !at::impl::torch_function_mode_enabled();
}

bool is_plain(const at::Tensor& t) {
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
    if (start.defined() &&
        !(suits(start) && start.sizes() == at::IntArrayRef({x.size(0), size}))) {
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

class AffineFixedPointBackward : public Node {
 public:
  enum Input { kWeight, kX, kInputWeight, kBias, kInputs };

  AffineFixedPointBackward(PlanPointer plan, py::handle record)
      : plan_(std::move(plan)), record_(hold(record)) {}

  std::string name() const override { return "AffineFixedPointBackward"; }

  void save(Input input, const at::Tensor& t) { saved_[input] = SavedVariable(t, false); }
  void save_outputs(const variable_list& outputs) {
    value_ = SavedVariable(outputs[0], false);
    status_ = SavedVariable(outputs[1], false);
    slope_ = SavedVariable(outputs[5], false);
  }

  void release_variables() override {
    for (SavedVariable& saved : saved_) saved.reset_data();
    value_.reset_data();
    status_.reset_data();
    slope_.reset_data();
  }

  variable_list apply(variable_list&& gradients) override {
    const at::Tensor grad = gradients[0];
    if (!grad.defined()) return variable_list(kInputs);
    if (at::GradMode::is_enabled() || !is_plain_context() || !is_plain(grad)) {
      return apply_in_python(grad);
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor value = value_.unpack();
    variable_list outputs = (*plan_->adjoint)(
        {saved_[kWeight].unpack(), slope_.unpack(), grad, c10::IValue()});
    const at::Tensor q = outputs[0];
    report(std::move(outputs));
    variable_list result(kInputs);
    const at::Tensor rows = q.t();
    if (task_should_compute_output(kWeight)) result[kWeight] = at::mm(rows, value);
    if (task_should_compute_output(kX)) result[kX] = at::mm(q, saved_[kInputWeight].unpack());
    if (task_should_compute_output(kInputWeight)) {
      result[kInputWeight] = at::mm(rows, saved_[kX].unpack());
    }
    if (task_should_compute_output(kBias)) result[kBias] = q.sum(0);
    return result;
  }

 private:
  void report(variable_list&& outputs) {
    const bool failed = any_failed(outputs[1]);
    const py::gil_scoped_acquire gil;
    const py::object record = borrow(record_);
    SolveOutputs raw{std::move(outputs), borrow(plan_->adjoint_spec), py::none(), failed};
    record.attr("adjoint") = py::cast(std::move(raw));
    if (failed) record.attr("judge_adjoint")();
  }

  variable_list apply_in_python(const at::Tensor& grad) {
    // The value as what it is: an output of this node.
    at::Tensor value = value_.unpack().detach();
    torch::autograd::impl::set_gradient_edge(value, {getptr(), 0});
    const py::gil_scoped_acquire gil;
    py::tuple needed{size_t(kInputs)}, inputs{size_t(kInputs)};
    for (int i = 0; i < kInputs; ++i) {
      needed[i] = py::bool_(task_should_compute_output(i));
      inputs[i] = to_python(saved_[i].unpack());
    }
    const py::tuple found = borrow(plan_->backward)(
        borrow(plan_->adjoint_spec), borrow(record_), plan_->activation, needed, to_python(grad),
        inputs, to_python(value), to_python(status_.unpack()), to_python(slope_.unpack()));
    variable_list result;
    for (const py::handle each : found) result.push_back(to_tensor(each));
    return result;
  }

  PlanPointer plan_;
  c10::SafePyObject record_;
  SavedVariable saved_[kInputs], value_, status_, slope_;
};

// z, its solution left in `record`; None where the call is not for this plan.
py::object solve(const PlanPointer& plan, py::handle record, py::handle py_weight, py::handle py_x,
                 py::handle py_input_weight, py::handle py_bias, py::handle py_start) {
  for (const py::handle object : {py_weight, py_x, py_input_weight, py_bias, py_start}) {
    if (!object.is_none() && !THPVariable_CheckExact(object.ptr())) return py::none();
  }
  if (py_weight.is_none() || py_x.is_none() || py_input_weight.is_none()) return py::none();
  const at::Tensor weight = to_tensor(py_weight), x = to_tensor(py_x), bias = to_tensor(py_bias),
                   input_weight = to_tensor(py_input_weight), start = to_tensor(py_start);
  const bool differentiable =
      torch::autograd::compute_requires_grad(weight, x, input_weight, bias);
  if (differentiable && !plan->adjoint) return py::none();
  if (!is_plain_context() || !plan->fits(weight, x, input_weight, bias, start)) return py::none();

  variable_list outputs;
  at::Tensor z;
  bool failed = false;
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor injection = at::linear(x, input_weight, bias);
    outputs = plan->forward({weight, injection, start.defined() ? start : c10::IValue(),
                             plan->activation, differentiable});
    z = outputs[0].clone();  // what comes next may write to it
    failed = any_failed(outputs[1]);
  }
  if (differentiable) {
    AffineFixedPointBackward* node = nullptr;
    const NodePointer pointer = make_node<NodePointer>(node, plan, record);
    node->set_next_edges(torch::autograd::collect_next_edges(weight, x, input_weight, bias));
    node->save(AffineFixedPointBackward::kWeight, weight);
    node->save(AffineFixedPointBackward::kX, x);
    node->save(AffineFixedPointBackward::kInputWeight, input_weight);
    node->save(AffineFixedPointBackward::kBias, bias);
    node->save_outputs(outputs);
    torch::autograd::set_history(z, pointer);
  }
  SolveOutputs raw{std::move(outputs), borrow(plan->forward_spec), borrow(plan->contraction),
                   failed};
  record.attr("forward") = py::cast(std::move(raw));
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(z)));
}

}  // namespace

void bind_affine_node(py::module_& m) {
  py::class_<SolveOutputs>(m, "SolveOutputs", "The outputs of an operator of a solve.")
      .def("unpack", &SolveOutputs::unpack, "The tensors, in the order of the operator's schema.")
      .def_readonly("spec", &SolveOutputs::spec)
      .def_readonly("contraction", &SolveOutputs::contraction)
      .def_readonly("failed", &SolveOutputs::failed);
  py::class_<AffinePlan, std::shared_ptr<AffinePlan>>(m, "AffinePlan",
                                                      "A solve and its adjoint, prepared.")
      .def(py::init<int64_t, py::handle, std::string, const py::tuple&,
                    const std::optional<py::tuple>&, py::handle, py::handle, py::handle,
                    py::handle>(),
           py::arg("size"), py::arg("dtype"), py::arg("activation"), py::arg("forward"),
           py::arg("adjoint"), py::arg("forward_spec"), py::arg("adjoint_spec"),
           py::arg("contraction"), py::arg("backward"))
      .def(
          "solve",
          [](const std::shared_ptr<AffinePlan>& plan, py::handle record, py::handle weight,
             py::handle x, py::handle input_weight, py::handle bias, py::handle start) {
            return solve(plan, record, weight, x, input_weight, bias, start);
          },
          "z, its solution left in `record`; None where the call is not for this plan.");
}

}  // namespace fastdeq
