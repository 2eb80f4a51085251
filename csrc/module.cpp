// The extension module. Operators register themselves with the dispatcher when it is loaded; what
// is bound here is information on the build alone.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/engine.h"

namespace {

std::string describe_engine() {
  std::string text = fastdeq::engine().name;
  if (fastdeq::has_ramp()) text += " with 8-bit and bfloat16 products";
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
      {"ramp", fastdeq::has_ramp() ? "yes" : "no"},
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of fastdeq.";
  m.def("build_info", &build_info, "How the extension was built.");
}
