// The iterations of a general map for Python: see cpu/iteration.h.

#include "iteration_module.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <limits>
#include <string>

#include "common/boxed_arguments.h"
#include "cpu/iteration.h"

namespace fastdeq {
namespace {

namespace py = pybind11;

py::object to_python(const at::Tensor& t) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
}

int32_t count_of(const py::object& options, const char* name) {
  const int64_t value = options.attr(name).cast<int64_t>();
  return int32_t(std::min<int64_t>(value, std::numeric_limits<int32_t>::max() - 1));
}

// From a fastdeq.solvers.SolveOptions.
SolveOptions options_of(const py::object& given) {
  const auto number = [&](const char* name) { return given.attr(name).cast<double>(); };
  SolveOptions o;
  o.solver = known_solver(given.attr("solver").cast<std::string>());
  o.tol = number("tol");
  o.atol = number("atol");
  o.max_iter = count_of(given, "max_iter");
  o.patience = count_of(given, "patience");
  o.damping = number("damping");
  o.fixed_iterations = count_of(given, "fixed_iterations");
  o.radius = number("radius");
  if (o.solver == Solver::kAnderson) {
    o.window = std::min(count_of(given, "window"), o.updates());  // more are never used
    o.first_window = count_of(given, "first_window");
  }
  o.regularization = number("regularization");
  o.rank_tolerance = number("rank_tolerance");
  o.max_weight = number("max_weight");
  o.safeguard = number("safeguard");
  o.accelerate_above = number("accelerate_above");
  o.min_iter = count_of(given, "min_iter");
  return o;
}

// Numbers on the CPU: no subclass with a dispatch of its own, no transform.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::AutocastCPU});
  return (t.key_set().raw_repr() & ~kPlain.raw_repr()) == 0;
}

bool supports(py::handle start) {
  const at::Tensor& t = THPVariable_Unpack(start.ptr());
  return is_plain(t) && t.dim() == 2 &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

at::Tensor to_tensor(py::handle object) {
  return object.is_none() ? at::Tensor() : THPVariable_Unpack(object.ptr());
}

std::unique_ptr<Iteration> make(py::handle start, const py::object& options,
                                const std::vector<int64_t>& parts, py::handle offset,
                                py::handle scale, bool apart) {
  const c10::InferenceMode off(false);  // the versions of the point are to be counted
  return Iteration::make(THPVariable_Unpack(start.ptr()), options_of(options), parts, apart,
                         to_tensor(offset), to_tensor(scale));
}

int64_t advance(Iteration& iteration, py::handle value) {
  std::vector<at::Tensor> given;
  if (py::isinstance<py::list>(value)) {
    for (const py::handle part : value) given.push_back(to_tensor(part));
  } else if (!value.is_none()) {
    given.push_back(to_tensor(value));
  }
  for (const at::Tensor& t : given) {
    TORCH_CHECK(is_plain(t), "the map returned other than a dense tensor for a state that is one");
  }
  const py::gil_scoped_release unlocked;
  const c10::InferenceMode off(false);
  const at::AutoDispatchBelowADInplaceOrView below;  // no history, whatever grad mode is
  return iteration.advance(given);
}

// Tensors of their own on the same memory, so that whether somebody holds it can be seen.
py::object point(const Iteration& iteration) {
  const c10::InferenceMode off(false);
  return to_python(iteration.point());
}

py::list points(const Iteration& iteration) {
  const c10::InferenceMode off(false);
  py::list parts;
  for (const at::Tensor& part : iteration.points()) parts.append(to_python(part));
  return parts;
}

py::tuple result(const Iteration& iteration) {
  const IterationResult r = iteration.result();
  return py::make_tuple(to_python(r.value), to_python(r.status), to_python(r.iterations),
                        to_python(r.residual), to_python(r.rejects), to_python(r.rate),
                        to_python(r.middle), to_python(r.end));
}

}  // namespace

void bind_iteration(py::module_& m) {
  py::class_<Iteration>(m, "Iteration", "The iterations of a general map between its evaluations.")
      .def(py::init(&make), py::arg("start"), py::arg("options"), py::arg("parts"),
           py::arg("offset") = py::none(), py::arg("scale") = py::none(), py::arg("apart") = false)
      .def_static("supports", &supports, py::arg("start"),
                  "Whether there are iterations for rows like these.")
      .def("point", &point, "Where to evaluate the map, (B, n).")
      .def("points", &points, "The same as a list of parts, (B, n_p) each.")
      .def("advance", &advance, py::arg("value"),
           "Takes the map's value there, (B, n), a list of parts (B, n_p), or None for zeros; how "
           "many samples go on.")
      .def(
          "running", [](const Iteration& iteration) { return to_python(iteration.running()); },
          "Which samples go on, int64.")
      .def("result", &result,
           "value, status, iterations, residual, rejects, rate, middle, end: per sample.");
}

}  // namespace fastdeq
