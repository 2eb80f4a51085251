// The small solve of Anderson acceleration by kSolveLanes neighbouring threads of a warp, for
// windows up to kSolveLanes: four samples to a warp, lane i of eight with row i of the matrix in
// its registers. The arithmetic of solve_small in csrc/anderson.h, in the same order, but for the
// sum of the weights.
//
// Elimination of column j: one division in every lane and 2 exchanges for each entry right of it.
// solve_small does the p^2 divisions and p^3 updates of a sample one after the other, and waits for
// memory in between; here p divisions follow each other. Counted, not measured.

#pragma once

#include "anderson.h"
#include "device.cuh"

namespace fastdeq {
namespace cuda {

constexpr int kSolveLanes = 8;

// Called by all lanes of a warp, each eight with their own arguments; `wanted` is false for those
// that only keep the others company. Writes gamma[0 .. slots - 2], newest difference first.
__device__ inline AndersonOutcome solve_small_together(bool wanted, const double* gram, int slots,
                                                       int slot, int count,
                                                       const AndersonOptions& options,
                                                       double* gamma) {
  const int lane = threadIdx.x % kSolveLanes;
  const int base = threadIdx.x % kWarpLanes - lane;
  const auto from = [&](double value, int i) { return __shfl_sync(kAllLanes, value, base + i); };
  const int p = !wanted ? 0 : count < slots - 1 ? count : slots - 1;
  const bool used = lane < p;

  double row[kSolveLanes] = {}, scale = 0, rhs = 0, newest = 0, to_newest = 0;
  int own = 0;
  if (used) {
    own = int(slot_of(slot, lane + 1, slots));
    newest = gram[slot * slots + slot];
    to_newest = gram[slot * slots + own];
#pragma unroll
    for (int j = 0; j < kSolveLanes; ++j) {
      if (j < p) row[j] = gram[own * slots + slot_of(slot, j + 1, slots)];
    }
    const double square = newest - 2 * to_newest + gram[own * slots + own];
    const bool usable = square > 0 && std::isfinite(square);
    scale = usable ? 1 / std::sqrt(square) : 0;
    rhs = usable ? (newest - to_newest) * scale : 0;
  }
#pragma unroll
  for (int j = 0; j < kSolveLanes; ++j) {
    const double other = from(to_newest, j), other_scale = from(scale, j);
    const bool both = scale != 0 && other_scale != 0;
    const double inner = newest - to_newest - other + row[j];
    row[j] = (both ? inner * scale * other_scale : 0) + (lane == j ? options.regularization : 0);
  }

  int dropped = 0;
#pragma unroll
  for (int j = 0; j < kSolveLanes; ++j) {  // Gauss-Jordan; the pivots are those of an LDL^T
    if (__ballot_sync(kAllLanes, j < p) == 0) break;
    const double pivot = from(row[j], j);
    const bool kept = from(scale, j) != 0 && pivot > options.rank_tolerance;
    const double factor = kept && lane != j && used ? row[j] / pivot : 0;
    const bool changes = kept && lane != j && used;
#pragma unroll
    for (int l = j; l < kSolveLanes; ++l) {
      const double entry = from(row[l], j);
      if (changes) row[l] -= factor * entry;
    }
    const double other = from(rhs, j);
    if (changes) rhs -= factor * other;
    if (j < p && !kept) {
      ++dropped;
      if (lane == j) scale = 0;
    }
  }

  double diagonal = 1;
#pragma unroll
  for (int j = 0; j < kSolveLanes; ++j) diagonal = lane == j ? row[j] : diagonal;
  double weight = scale == 0 ? 0 : rhs / diagonal * scale, sum = std::fabs(weight);
  for (int bits = kSolveLanes / 2; bits > 0; bits /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, bits);
  }
  const bool rejected = !(sum <= options.max_weight);  // a NaN sum counts as rejected
  if (rejected) weight = 0;
  if (wanted && lane < slots - 1) gamma[lane] = weight;
  return {dropped, rejected};
}

}  // namespace cuda
}  // namespace fastdeq
