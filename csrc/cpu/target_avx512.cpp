// The engine for AVX-512 (F, BW, DQ, VL), with AVX-512 BF16 for the precision ramp; whether the
// machine has the latter is asked at run time.

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "activation_names.h"
#include "solve_task.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")

#define FASTDEQ_TARGET avx512
#define FASTDEQ_VECTOR_BYTES 64
#define FASTDEQ_BFLOAT16
#include "worker.h"

namespace fastdeq {

const Engine& engine_avx512() {
  static constexpr Engine engine{"avx512", avx512::engine_for<float>(),
                                 avx512::engine_for<double>()};
  return engine;
}

}  // namespace fastdeq
