// The engine for AVX-512 (F, BW, DQ, VL), with BF16 and VNNI for low-precision products; whether
// the machine has these two is asked at run time.

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/activation_names.h"
#include "cpu/solve_task.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma"))), \
    apply_to = function)
#else
// GCC 12 warns of the deliberately undefined vectors in its own header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
#pragma GCC target("prefer-vector-width=512")
#endif

#define FASTDEQ_TARGET avx512
#define FASTDEQ_VECTOR_BYTES 64
#define FASTDEQ_LOW_PRECISION
#include "cpu/worker.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastdeq {

const Engine& engine_avx512() {
  static constexpr Engine engine{"avx512", avx512::engine_for<float>(),
                                 avx512::engine_for<double>()};
  return engine;
}

}  // namespace fastdeq
