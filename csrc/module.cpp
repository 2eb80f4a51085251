// The extension module. Operators register themselves with the dispatcher when it is loaded; what
// is bound here is information, on the build and on what a GPU engine supports, the affine cell's
// solve with its gradient in one call, and for general maps their iterations and the leaves of an
// evaluation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <atomic>
#include <map>
#include <string>

#include "affine_node.h"
#include "cpu/engine.h"
#include "cpu/interrupt.h"
#include "cuda/persistent_task.h"
#include "iteration_module.h"
#include "outer_leaves.h"

namespace {

std::string describe_engine() {
  std::string text = fastdeq::engine().name;
  if (fastdeq::has_low_precision()) text += " with 8-bit and bfloat16 products";
  text += "; compiled in:";
#if defined(FASTDEQ_HAS_AVX512)
  text += " avx512";
#endif
#if defined(FASTDEQ_HAS_AVX2)
  text += " avx2";
#endif
  return text + " generic";
}

std::map<std::string, std::string> build_info() {
  return {
      {"cuda", FASTDEQ_WITH_CUDA ? "yes" : "no"},
      {"torch", TORCH_VERSION},
      {"engine", describe_engine()},
      {"low_precision", fastdeq::has_low_precision() ? "yes" : "no"},
#if defined(_OPENMP)
      {"threads", "OpenMP"},
#else
      {"threads", "one: the operators run serially"},
#endif
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#elif defined(__GNUC__)
      {"compiler", "gcc " __VERSION__},
#else
      {"compiler", "unknown"},
#endif
  };
}

std::map<std::string, double> constants() {
  std::map<std::string, double> values;
  for (const auto& [name, value] : fastdeq::kConstants) values[name] = value;
  return values;
}

// Why a solve does not fit a device of which so much is known; empty where it does.
std::string why_not_persistent(int64_t size, int64_t batch, int element_bytes, int window,
                               int multiprocessors, int64_t shared_bytes) {
  fastdeq::cuda::PersistentProblem problem;
  problem.size = size;
  problem.batch = batch;
  problem.element_bytes = element_bytes;
  problem.window = window;
  problem.sample_bytes = int(sizeof(fastdeq::cuda::TileSample));
  return fastdeq::cuda::plan_persistent(problem, {multiprocessors, shared_bytes}).reason;
}

// The thread that Python handles signals on.
std::atomic<unsigned long> main_thread{0};

// Other threads need not wait for the interpreter's lock, which they may never get.
void check_signals() {
  if (PyThread_get_thread_ident() != main_thread.load() || !Py_IsInitialized()) return;
  const pybind11::gil_scoped_acquire lock;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

void watch_signals() {
  const auto threading = pybind11::module_::import("threading");
  main_thread = threading.attr("main_thread")().attr("ident").cast<unsigned long>();
#if !defined(_WIN32)
  // As in Python, the thread that forks is the main thread of the child.
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
#endif
  fastdeq::set_signal_check(&check_signals);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "Compiled operators of fastdeq.";
  watch_signals();
  m.def("build_info", &build_info, "How the extension was built.");
  m.def("constants", &constants, "The numbers of fastdeq/constants.py, as compiled.");
  m.def("why_not_persistent", &why_not_persistent, py::arg("size"), py::arg("batch"),
        py::arg("element_bytes"), py::arg("window"), py::arg("multiprocessors"),
        py::arg("shared_bytes"),
        "Why the persistent CUDA engine cannot hold a solve; empty where it can.");
  fastdeq::bind_affine_node(m);
  fastdeq::bind_iteration(m);
  fastdeq::bind_outer_leaves(m);
}
