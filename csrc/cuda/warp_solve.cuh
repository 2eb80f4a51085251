// The small solve of Anderson acceleration by one warp, for any window: solve_small of
// csrc/anderson.h with a row of the matrix to each lane. Every entry goes through the same
// operations in the same order, so the results are the same.
//
// The elimination of p columns takes p steps with p^2 / 2 multiply-adds in sequence for p up to 32,
// where one thread has p^3 / 2. Counted, not measured.

#pragma once

#include "anderson.h"
#include "device.cuh"

namespace fastdeq {
namespace cuda {

// Called by all lanes of a warp, which all get the outcome. The Gram matrix (slots, slots) is
// contiguous; `work` holds p (p + 1) doubles, `gamma` slots - 1, both in shared memory.
__device__ inline AndersonOutcome solve_small_by_warp(const double* gram, int slots, int slot,
                                                      int count, const AndersonOptions& options,
                                                      double* work, double* gamma) {
  const int lane = threadIdx.x % kWarpLanes;
  const int p = count < slots - 1 ? count : slots - 1;  // columns in use
  const auto at = [=](int age) { return int(slot_of(slot, age, slots)); };
  const auto g = [=](int i, int j) { return gram[i * slots + j]; };
  const double newest = g(slot, slot);
  double* matrix = work;         // p x p
  double* scale = work + p * p;  // p: inverse norm of a column, 0 where it is not used
  int dropped = 0;

  for (int i = lane; i < slots - 1; i += kWarpLanes) {
    if (i >= p) {
      gamma[i] = 0;
      continue;
    }
    const int si = at(i + 1);
    const double square = newest - 2 * g(slot, si) + g(si, si);
    const bool usable = square > 0 && std::isfinite(square);
    scale[i] = usable ? 1 / std::sqrt(square) : 0;
    gamma[i] = usable ? (newest - g(slot, si)) * scale[i] : 0;
  }
  __syncwarp();
  for (int e = lane; e < p * p; e += kWarpLanes) {
    const int i = e / p, j = e % p, si = at(i + 1), sj = at(j + 1);
    const bool both = scale[i] != 0 && scale[j] != 0;
    const double inner = newest - g(slot, si) - g(slot, sj) + g(si, sj);
    matrix[e] = (both ? inner * scale[i] * scale[j] : 0) + (i == j ? options.regularization : 0);
  }
  __syncwarp();

  for (int j = 0; j < p; ++j) {  // Gauss-Jordan; the pivots are those of an LDL^T
    const double pivot = matrix[j * p + j];
    const bool drop = scale[j] == 0 || !(pivot > options.rank_tolerance);
    __syncwarp();  // before a lane changes what another has yet to read
    if (drop) {
      ++dropped;
      if (lane == 0) scale[j] = 0;
    } else {
      for (int i = lane; i < p; i += kWarpLanes) {
        if (i == j) continue;
        const double factor = matrix[i * p + j] / pivot;
        for (int l = j; l < p; ++l) matrix[i * p + l] -= factor * matrix[j * p + l];
        gamma[i] -= factor * gamma[j];
      }
    }
    __syncwarp();
  }

  for (int i = lane; i < p; i += kWarpLanes) {
    gamma[i] = scale[i] == 0 ? 0 : gamma[i] / matrix[i * p + i] * scale[i];
  }
  __syncwarp();
  double sum = 0;
  for (int i = 0; i < p; ++i) sum += std::fabs(gamma[i]);
  const bool rejected = !(sum <= options.max_weight);  // a NaN sum counts as rejected
  __syncwarp();
  if (rejected) {
    for (int i = lane; i < p; i += kWarpLanes) gamma[i] = 0;
  }
  __syncwarp();
  return {dropped, rejected};
}

}  // namespace cuda
}  // namespace fastdeq
