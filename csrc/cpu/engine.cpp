#include "cpu/engine.h"

#include <ATen/Version.h>

#include <string>

namespace fastdeq {
namespace {

const Engine& choose() {
  const std::string allowed = at::get_cpu_capability();
#if defined(FASTDEQ_HAS_AVX512)
  if (allowed == "AVX512" && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return engine_avx512();
  }
#endif
#if defined(FASTDEQ_HAS_AVX2)
  if ((allowed == "AVX512" || allowed == "AVX2") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return engine_avx2();
  }
#endif
  return engine_generic();
}

}  // namespace

const Engine& engine() {
  static const Engine& chosen = choose();
  return chosen;
}

bool has_low_precision() {
#if defined(FASTDEQ_HAS_AVX512)
  static const bool has = &engine() == &engine_avx512() && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

}  // namespace fastdeq
