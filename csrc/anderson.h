// The small solve of Anderson acceleration, the same code on the CPU and the GPU.
//
//   g_k          newest residual, slot k of a ring buffer of m slots
//   gram[i, j]   <g_i, g_j>, float64
//   dg_i         g_k - g_i, so <dg_i, dg_j> = gram[k,k] - gram[k,i] - gram[k,j] + gram[i,j]
//   gamma        argmin |g_k - sum gamma_i dg_i|^2 + ridge, columns at unit norm
//
// Columns are eliminated newest first; one whose pivot is at or below the rank tolerance depends on
// newer ones and is dropped. Specification: fastdeq/reference.py, anderson_mix.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTDEQ_HOST_DEVICE __host__ __device__
#else
#define FASTDEQ_HOST_DEVICE
#endif

namespace fastdeq {

struct AndersonOptions {
  double damping;
  double regularization;
  double rank_tolerance;
  double max_weight;
};

struct AndersonOutcome {
  int32_t dropped;
  bool rejected;
};

// Slot of the entry that is `age` steps older than the newest one.
FASTDEQ_HOST_DEVICE inline int64_t slot_of(int64_t newest, int64_t age, int64_t slots) {
  const int64_t slot = newest - age;
  return slot < 0 ? slot + slots : slot;
}

// Writes gamma[0 .. slots-2], newest difference first. `work` holds (slots-1) * slots doubles.
// gram is addressed as gram[i * stride0 + j * stride1].
FASTDEQ_HOST_DEVICE inline AndersonOutcome solve_small(const double* gram, int64_t stride0,
                                                       int64_t stride1, int64_t slots, int64_t slot,
                                                       int64_t count,
                                                       const AndersonOptions& options, double* work,
                                                       double* gamma) {
  const int64_t p = count < slots - 1 ? count : slots - 1;  // columns in use
  const auto g = [&](int64_t i, int64_t j) { return gram[i * stride0 + j * stride1]; };
  const double newest = g(slot, slot);
  double* matrix = work;         // p x p
  double* scale = work + p * p;  // p: inverse norm of a column, 0 where it is not used
  int32_t dropped = 0;

  for (int64_t i = p; i < slots - 1; ++i) gamma[i] = 0;
  for (int64_t i = 0; i < p; ++i) {
    const int64_t si = slot_of(slot, i + 1, slots);
    const double square = newest - 2 * g(slot, si) + g(si, si);
    const bool usable = square > 0 && std::isfinite(square);
    scale[i] = usable ? 1 / std::sqrt(square) : 0;
    gamma[i] = usable ? (newest - g(slot, si)) * scale[i] : 0;
  }
  for (int64_t i = 0; i < p; ++i) {
    const int64_t si = slot_of(slot, i + 1, slots);
    for (int64_t j = 0; j < p; ++j) {
      const int64_t sj = slot_of(slot, j + 1, slots);
      const bool both = scale[i] != 0 && scale[j] != 0;
      const double inner = newest - g(slot, si) - g(slot, sj) + g(si, sj);
      matrix[i * p + j] =
          (both ? inner * scale[i] * scale[j] : 0) + (i == j ? options.regularization : 0);
    }
  }

  for (int64_t j = 0; j < p; ++j) {  // Gauss-Jordan; the pivots are those of an LDL^T
    const double pivot = matrix[j * p + j];
    if (scale[j] == 0 || !(pivot > options.rank_tolerance)) {
      ++dropped;
      scale[j] = 0;
      continue;
    }
    for (int64_t i = 0; i < p; ++i) {
      if (i == j) continue;
      const double factor = matrix[i * p + j] / pivot;
      for (int64_t l = j; l < p; ++l) matrix[i * p + l] -= factor * matrix[j * p + l];
      gamma[i] -= factor * gamma[j];
    }
  }

  double sum = 0;
  for (int64_t i = 0; i < p; ++i) {
    gamma[i] = scale[i] == 0 ? 0 : gamma[i] / matrix[i * p + i] * scale[i];
    sum += std::fabs(gamma[i]);
  }
  const bool rejected = !(sum <= options.max_weight);  // a NaN sum counts as rejected
  if (rejected) {
    for (int64_t i = 0; i < p; ++i) gamma[i] = 0;
  }
  return {dropped, rejected};
}

}  // namespace fastdeq
