// The small solve of Anderson acceleration, the same code for a thread and for a warp.
//
//   g_k          newest residual, entry k of a ring buffer of m entries
//   gram[i, j]   <g_i, g_j>, float64
//   dg_i         g_k - g_i, so <dg_i, dg_j> = gram[k,k] - gram[k,i] - gram[k,j] + gram[i,j]
//   gamma        argmin |g_k - sum gamma_i dg_i|^2 + ridge, columns at unit norm
//
// Columns are eliminated newest first; one whose pivot is at or below the rank tolerance depends on
// newer ones and is dropped. Specification: fastdeq/ops/anderson_mix.py.
//
// A lane has every stride-th row of the matrix. Each number goes through the same operations in the
// same order for any number of lanes. The elimination of p columns takes a warp p steps with p^2 /
// 2 multiply-adds in sequence for p up to 32, where one thread has p^3 / 2.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/solve_options.h"

namespace fastdeq {

struct AndersonOutcome {
  int32_t dropped;
  bool rejected;
};

// A Gram matrix of a ring of entries: <g_i, g_j> is at data[i * stride0 + j * stride1].
struct Gram {
  const double* data;
  int64_t stride0, stride1;
  int entries, newest;
  int count;  // differences in use, at most entries - 1

  // <g_i, g_j> of the entries that are so many steps older than the newest one.
  FASTDEQ_HOST_DEVICE double of_ages(int i, int j) const;
};

// The entry that is `age` steps older than the newest one.
FASTDEQ_HOST_DEVICE inline int64_t entry_of(int64_t newest, int64_t age, int64_t entries) {
  const int64_t entry = newest - age;
  return entry < 0 ? entry + entries : entry;
}

FASTDEQ_HOST_DEVICE inline double Gram::of_ages(int i, int j) const {
  return data[entry_of(newest, i, entries) * stride0 + entry_of(newest, j, entries) * stride1];
}

// A thread on its own. A warp is WarpLanes in cuda/device.cuh.
struct OneLane {
  FASTDEQ_HOST_DEVICE static int first() { return 0; }
  FASTDEQ_HOST_DEVICE static int stride() { return 1; }
  FASTDEQ_HOST_DEVICE static void sync() {}
};

// Doubles that the small solve works on, for so many differences.
constexpr int64_t small_solve_doubles(int64_t differences) {
  return differences * (differences + 1);
}

// Called by all lanes, which all get the outcome. Writes gamma[0 .. entries-2], newest difference
// first; `work` holds small_solve_doubles.
template <typename Lanes>
FASTDEQ_HOST_DEVICE inline AndersonOutcome solve_small(Lanes lanes, const Gram& gram,
                                                       const SolveOptions& options, double* work,
                                                       double* gamma) {
  const int p = gram.count < gram.entries - 1 ? gram.count : gram.entries - 1;  // columns in use
  const int first = lanes.first(), stride = lanes.stride();
  const double newest = gram.of_ages(0, 0);
  double* const matrix = work;         // p x p
  double* const scale = work + p * p;  // p: inverse norm of a column, 0 where it is not used
  int32_t dropped = 0;

  for (int i = first; i < gram.entries - 1; i += stride) {
    if (i >= p) {
      gamma[i] = 0;
      continue;
    }
    const double inner = gram.of_ages(0, i + 1);
    const double square = newest - 2 * inner + gram.of_ages(i + 1, i + 1);
    const bool usable = square > 0 && std::isfinite(square);
    scale[i] = usable ? 1 / std::sqrt(square) : 0;
    gamma[i] = usable ? (newest - inner) * scale[i] : 0;
  }
  lanes.sync();
  for (int i = first; i < p; i += stride) {
    for (int j = 0; j < p; ++j) {
      const bool both = scale[i] != 0 && scale[j] != 0;
      const double inner =
          newest - gram.of_ages(0, i + 1) - gram.of_ages(0, j + 1) + gram.of_ages(i + 1, j + 1);
      matrix[i * p + j] =
          (both ? inner * scale[i] * scale[j] : 0) + (i == j ? options.regularization : 0);
    }
  }
  lanes.sync();

  for (int j = 0; j < p; ++j) {  // Gauss-Jordan; the pivots are those of an LDL^T
    const double pivot = matrix[j * p + j];
    const bool drop = scale[j] == 0 || !(pivot > options.rank_tolerance);
    lanes.sync();  // before a lane changes what another has yet to read
    dropped += drop;
    if (drop && first == 0) scale[j] = 0;
    for (int i = first; i < p && !drop; i += stride) {
      if (i == j) continue;
      const double factor = matrix[i * p + j] / pivot;
      for (int l = j; l < p; ++l) matrix[i * p + l] -= factor * matrix[j * p + l];
      gamma[i] -= factor * gamma[j];
    }
    lanes.sync();
  }

  for (int i = first; i < p; i += stride) {
    gamma[i] = scale[i] == 0 ? 0 : gamma[i] / matrix[i * p + i] * scale[i];
  }
  lanes.sync();
  double sum = 0;
  for (int i = 0; i < p; ++i) sum += std::fabs(gamma[i]);
  const bool rejected = !(sum <= options.max_weight);  // a NaN sum counts as rejected
  lanes.sync();
  for (int i = first; i < p && rejected; i += stride) gamma[i] = 0;
  lanes.sync();
  return {dropped, rejected};
}

}  // namespace fastdeq
