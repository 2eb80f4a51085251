// The leaves that the graph of one evaluation of a map ends at: outer_leaves of
// fastdeq/solve/closure.py, which says what it is for, at a few tens of nanoseconds per node.
//
// A node belongs to the evaluation where the same thread made it after the node of the state. The
// sequence number of a leaf's node is above all others.

#include "outer_leaves.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <unordered_set>
#include <utility>
#include <vector>

namespace fastdeq {
namespace {

namespace py = pybind11;
using torch::autograd::AccumulateGrad;
using torch::autograd::Node;

// None where other tensors that are no leaves are used than `known`.
py::object outer_leaves(py::handle value, py::handle at, const py::list& known) {
  const auto root = THPVariable_Unpack(value.ptr()).grad_fn();
  const auto begin = THPVariable_Unpack(at.ptr()).grad_fn();
  py::list leaves;
  std::vector<std::pair<const Node*, uint32_t>> edges;
  for (const py::handle object : known) {
    const at::Tensor& t = THPVariable_Unpack(object.ptr());
    edges.emplace_back(t.grad_fn().get(), t.output_nr());
  }
  std::vector<bool> used(edges.size());
  std::unordered_set<const Node*> seen;
  std::vector<const Node*> stack;
  if (root) stack.push_back(root.get());
  while (!stack.empty()) {
    const Node* node = stack.back();
    stack.pop_back();
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      const Node* next = edge.function.get();
      if (next == nullptr || next == begin.get()) continue;
      const bool is_inside = next->thread_id() == begin->thread_id() &&
                             next->sequence_nr() > begin->sequence_nr() &&
                             next->sequence_nr() <= root->sequence_nr();
      if (is_inside) {
        if (seen.insert(next).second) stack.push_back(next);
      } else if (const auto* leaf = dynamic_cast<const AccumulateGrad*>(next)) {
        if (!seen.insert(next).second) continue;
        leaves.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf->variable)));
      } else {
        size_t i = 0;
        while (i < edges.size() && edges[i] != std::pair(next, edge.input_nr)) ++i;
        if (i == edges.size()) return py::none();
        used[i] = true;
      }
    }
  }
  for (const bool one : used) {
    if (!one) return py::none();
  }
  return std::move(leaves);
}

}  // namespace

void bind_outer_leaves(py::module_& m) {
  m.def("outer_leaves", &outer_leaves, py::arg("value"), py::arg("at"), py::arg("known"));
}

}  // namespace fastdeq
