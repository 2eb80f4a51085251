// The engine for AVX2 with FMA.

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "activation_names.h"
#include "solve_task.h"

#pragma GCC target("avx2,fma")

#define FASTDEQ_TARGET avx2
#define FASTDEQ_VECTOR_BYTES 32
#include "worker.h"

namespace fastdeq {

const Engine& engine_avx2() {
  static constexpr Engine engine{"avx2", avx2::engine_for<float>(), avx2::engine_for<double>()};
  return engine;
}

}  // namespace fastdeq
