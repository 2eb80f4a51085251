// The right-hand sides of adjoint solves in unit rows, and their solutions back in the scale of the
// gradient: one launch each for what takes about ten small ones in ATen.
//
//   q = D (g + q W)   slope D, gradient g, solution q: (B, n), contiguous, T float or double
//   scale_rows        largest = max(max |D g|, LEAST_SCALE max |g|)
//                     norm = max(|D g / largest|, 1)
//                     rows = g / largest / norm, so that |D rows| = 1, or less where |g| would
//                     leave the range of T: a linear solve is homogeneous, its stop test is not
//   restore_rows      q = value norm largest, a step at a time, as the product may overflow
//
// Nothing depends on g where D is 0; a row of zeros in D has zeros as its rows, whatever g is. A
// row of which g or D g is not finite has NaN as its rows and as its norm, so that its solve ends
// at once and its solution is NaN: gradient scalers look for it. As in
// fastdeq/ops/solve_affine_adjoint.py.
//
// One block of 32 to 256 threads per row, which walks over it three times: the largest entries, the
// norm, the division. Sums are double, in an order that does not depend on timing. All reads along
// n are coalesced.
//
// Bytes per row, s to an element: scale_rows reads 2 n s, twice more from a cache, and writes n s;
// restore_rows reads n s and writes n s. About 8 operations per element: memory traffic should set
// the time. Compared with solve_affine_adjoint.py on the emulated machine of tests/cuda_emulator;
// compiled for sm_80 and sm_90. The block size is a choice, not a measurement.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/constants.h"
#include "cuda/device.cuh"

namespace fastdeq {
namespace cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpLanes;
constexpr size_t kRowSharedBytes = 3 * kRowWarps * sizeof(double);

inline unsigned threads_per_row(int64_t size) {
  const int64_t warps = (size + kWarpLanes - 1) / kWarpLanes;
  return unsigned(kWarpLanes * (warps < 1 ? 1 : warps < kRowWarps ? warps : kRowWarps));
}

// The values of all threads of the block combined, in every thread. `shared` is for kRowWarps
// values and has no other use.
template <typename T, typename Combine>
__device__ T over_block(T value, T* shared, Combine combine) {
  for (int bits = kWarpLanes / 2; bits > 0; bits /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, bits));
  }
  const int warps = blockDim.x / kWarpLanes;
  if (warps == 1) return value;
  if (threadIdx.x % kWarpLanes == 0) shared[threadIdx.x / kWarpLanes] = value;
  __syncthreads();
  value = shared[0];
  for (int w = 1; w < warps; ++w) value = combine(value, shared[w]);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    scale_rows_kernel(const T* __restrict__ slope, const T* __restrict__ grad, int64_t size,
                      T* __restrict__ rows, T* __restrict__ norms, T* __restrict__ largests) {
  const int64_t row = blockIdx.x;
  const T* const d = slope + row * size;
  const T* const g = grad + row * size;
  T* const to = rows + row * size;
  double* const squares = reinterpret_cast<double*>(shared_memory());
  T* const maxima = reinterpret_cast<T*>(squares + kRowWarps);
  const auto larger = [](T a, T b) { return a > b ? a : b; };

  // 1. The largest entries. NaN does not enter a maximum: it is looked for by itself.
  T most = 0, most_g = 0;
  bool alive = false, wrong = false;
  for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
    const T entry = d[j] * g[j];
    wrong |= !std::isfinite(g[j]);
    if (d[j] == 0) continue;
    alive = true;
    wrong |= !std::isfinite(entry);
    most = larger(most, std::fabs(entry));
    most_g = larger(most_g, std::fabs(g[j]));
  }
  alive = __syncthreads_or(alive);
  wrong = __syncthreads_or(wrong) && alive;
  most = over_block(most, maxima, larger);
  most_g = over_block(most_g, maxima + kRowWarps, larger);
  T largest = larger(most, most_g * T(kLeastScale));
  if (largest == 0 || wrong) largest = 1;

  // 2. The norm. Squares of entries below 1e-19 would vanish in float32, and of large ones
  // overflow.
  double square = 0;
  for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
    const double entry = d[j] == 0 ? 0 : double(d[j]) * double(g[j] / largest);
    square += entry * entry;
  }
  square = over_block(square, squares, [](double a, double b) { return a + b; });
  const T norm = wrong ? T(NAN) : T(square > 1 ? std::sqrt(square) : 1);

  // 3. The rows.
  for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
    to[j] = wrong ? T(NAN) : d[j] == 0 ? 0 : g[j] / largest / norm;
  }
  if (threadIdx.x == 0) {
    norms[row] = norm;
    largests[row] = largest;
  }
}

// `restored` may be `value` itself.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    restore_rows_kernel(const T* value, const T* __restrict__ norms, const T* __restrict__ largests,
                        int64_t size, T* restored) {
  const int64_t row = blockIdx.x;
  const T norm = norms[row], largest = largests[row];
  for (int64_t j = threadIdx.x; j < size; j += blockDim.x) {
    restored[row * size + j] = value[row * size + j] * norm * largest;
  }
}

#if defined(__CUDACC__)

// On the current device; there is at least one row. The caller checks the launch.
template <typename T>
void scale_rows(const T* slope, const T* grad, int64_t batch, int64_t size, T* rows, T* norms,
                T* largests, cudaStream_t stream) {
  scale_rows_kernel<T><<<unsigned(batch), threads_per_row(size), kRowSharedBytes, stream>>>(
      slope, grad, size, rows, norms, largests);
}

template <typename T>
void restore_rows(const T* value, const T* norms, const T* largests, int64_t batch, int64_t size,
                  T* restored, cudaStream_t stream) {
  restore_rows_kernel<T><<<unsigned(batch), threads_per_row(size), 0, stream>>>(
      value, norms, largests, size, restored);
}

#endif

}  // namespace cuda
}  // namespace fastdeq
