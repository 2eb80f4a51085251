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
// node asks Python for gradients that are to be differentiated again.
// What a solve reports is kept as tensors, and becomes a Solution when it is read.

#include "affine_node.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>

#include "affine_plan.h"
#include "cpu/threads.h"

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

class AffineFixedPointBackward : public Node {
 public:
  enum Saved { kWeight, kX, kInputWeight, kBias, kInputs, kValue = kInputs, kStatus, kSlope, kAll };

  AffineFixedPointBackward(PlanPointer plan, py::handle record, int64_t in_features)
      : plan_(std::move(plan)), record_(hold(record)), in_features_(in_features) {}

  std::string name() const override { return "AffineFixedPointBackward"; }

  void save(Saved what, const at::Tensor& t) { saved_[what] = SavedVariable(t, false); }

  void release_variables() override {
    for (SavedVariable& saved : saved_) saved.reset_data();
  }

  // Compiled autograd traces nodes in Python; solve/affine.py sees to it where it is told in time.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK(false, name(),
                ": compiled autograd has to be enabled before the forward pass of a ",
                "DEQLayer whose backward pass it is to trace.");
  }

  variable_list apply(variable_list&& gradients) override {
    const at::Tensor grad = gradients[0];
    if (!grad.defined()) return variable_list(kInputs);
    if (at::GradMode::is_enabled() || !is_plain_context() || !is_plain(grad)) {
      return apply_in_python(grad);
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor value = saved_[kValue].unpack();
    variable_list outputs =
        (*plan_->adjoint)({saved_[kWeight].unpack(), saved_[kSlope].unpack(), grad, c10::IValue()});
    const at::Tensor q = outputs[0];
    report(std::move(outputs));
    variable_list result(kInputs);
    const at::Tensor rows = q.t();
    const OneThread here(double(q.numel()) * double(std::max(in_features_, q.size(1))));
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
    SolveOutputs raw{std::move(outputs), borrow(plan_->adjoint_spec), py::none()};
    record.attr("adjoint") = py::cast(std::move(raw));
    if (failed) record.attr("judge_adjoint")();
  }

  variable_list apply_in_python(const at::Tensor& grad) {
    // The value as what it is: an output of this node.
    at::Tensor value = saved_[kValue].unpack().detach();
    torch::autograd::impl::set_gradient_edge(value, {getptr(), 0});
    const py::gil_scoped_acquire gil;
    py::tuple needed{size_t(kInputs)}, inputs{size_t(kInputs)};
    for (int i = 0; i < kInputs; ++i) {
      needed[i] = py::bool_(task_should_compute_output(i));
      inputs[i] = to_python(saved_[i].unpack());
    }
    const py::tuple found = borrow(plan_->backward)(
        borrow(plan_->adjoint_spec), borrow(record_), plan_->activation, needed, to_python(grad),
        inputs, to_python(value), to_python(saved_[kStatus].unpack()),
        to_python(saved_[kSlope].unpack()));
    variable_list result;
    for (const py::handle each : found) result.push_back(to_tensor(each));
    return result;
  }

  PlanPointer plan_;
  c10::SafePyObject record_;
  const int64_t in_features_;
  SavedVariable saved_[kAll];
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
  const bool differentiable = torch::autograd::compute_requires_grad(weight, x, input_weight, bias);
  if (differentiable && !plan->adjoint) return py::none();
  if (!is_plain_context() || !plan->fits(weight, x, input_weight, bias, start)) return py::none();

  variable_list outputs;
  at::Tensor z;
  bool failed = false;
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor injection;
    {
      const OneThread here(double(x.numel()) * double(plan->size));
      injection = at::linear(x, input_weight, bias);
    }
    outputs = plan->forward({weight, injection, start.defined() ? start : c10::IValue(),
                             plan->activation, differentiable, c10::IValue()});
    z = outputs[0].clone();  // what comes next may write to it
    failed = any_failed(outputs[1]);
  }
  if (differentiable) {
    using Backward = AffineFixedPointBackward;
    Backward* node = nullptr;
    const NodePointer pointer = make_node<NodePointer>(node, plan, record, x.size(1));
    node->set_next_edges(torch::autograd::collect_next_edges(weight, x, input_weight, bias));
    node->save(Backward::kWeight, weight);
    node->save(Backward::kX, x);
    node->save(Backward::kInputWeight, input_weight);
    node->save(Backward::kBias, bias);
    node->save(Backward::kValue, outputs[0]);
    node->save(Backward::kStatus, outputs[1]);
    node->save(Backward::kSlope, outputs[5]);
    torch::autograd::set_history(z, pointer);
  }
  SolveOutputs raw{std::move(outputs), borrow(plan->forward_spec), borrow(plan->contraction)};
  record.attr("forward") = py::cast(std::move(raw));
  if (failed) record.attr("judge_forward")();
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(z)));
}

}  // namespace

void bind_affine_node(py::module_& m) {
  py::class_<SolveOutputs>(m, "SolveOutputs", "The outputs of an operator of a solve.")
      .def("unpack", &SolveOutputs::unpack, "The tensors, in the order of the operator's schema.")
      .def_readonly("spec", &SolveOutputs::spec)
      .def_readonly("contraction", &SolveOutputs::contraction);
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
