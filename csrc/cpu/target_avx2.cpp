// The engine for AVX2 with FMA.

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/activation_names.h"
#include "cpu/solve_task.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FASTDEQ_TARGET avx2
#define FASTDEQ_VECTOR_BYTES 32
#include "cpu/worker.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastdeq {

const Engine& engine_avx2() {
  static constexpr Engine engine{"avx2", avx2::engine_for<float>(), avx2::engine_for<double>()};
  return engine;
}

}  // namespace fastdeq
