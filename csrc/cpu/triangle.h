// Products of one or two rows with a symmetric weight that is read where it lies, and of which only
// the upper triangle is read: half the traffic, where that is what limits, and nothing to pack.
//
//   y_j = sum_k W_jk z_k:    for each k   y[k:] += z_k W[k, k:],   y_k += W[k, k+1:] z[k+1:]
//
// Four rows of W at a time: per vector of outputs 4 loads of W and 8 R fused multiply-adds, next to
// R loads of z and R of y and a store.

#pragma once

#include "cpu/slot.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr int kTriangleRows = 2;
constexpr int64_t kTriangleBlock = 4;

// Adds what the rows begin <= k < end of W contribute. R rows z and y, padded to whole vectors.
template <typename T, int R>
void multiply_triangle(const T* weight, int64_t stride, int64_t size, int64_t begin, int64_t end,
                       const T* const* z, T* const* y) {
  constexpr int n = int(kTriangleBlock);
  int64_t k = begin;
  for (; k + n <= end; k += n) {
    const T* const row = weight + k * stride;
    for (int i = 0; i < n; ++i) {  // the square on the diagonal
      for (int r = 0; r < R; ++r) y[r][k + i] += row[i * stride + k + i] * z[r][k + i];
      for (int j = i + 1; j < n; ++j) {
        const T w = row[i * stride + k + j];
        for (int r = 0; r < R; ++r) {
          y[r][k + i] += w * z[r][k + j];
          y[r][k + j] += w * z[r][k + i];
        }
      }
    }
    Vec<T> factor[R][n], inner[R][n] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) factor[r][i] = splat<T>(z[r][k + i]);
    }
    const auto step = [&](const Vec<T>* w, int64_t j) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec<T> out = load(y[r] + j);
        const Vec<T> in = load(z[r] + j);
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
          out += factor[r][i] * w[i];
          inner[r][i] += in * w[i];
        }
        store(y[r] + j, out);
      }
    };
    Vec<T> w[n];
    int64_t j = k + n;
    for (; j + kLanes<T> <= size; j += kLanes<T>) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) w[i] = load(row + i * stride + j);
      step(w, j);
    }
    if (j < size) {
      for (int i = 0; i < n; ++i) w[i] = load_partial(row + i * stride + j, int(size - j));
      step(w, j);
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < n; ++i) y[r][k + i] += T(sum(inner[r][i]));
    }
  }
  for (; k < end; ++k) {
    const T* const row = weight + k * stride;
    for (int r = 0; r < R; ++r) y[r][k] += row[k] * z[r][k];
    for (int64_t j = k + 1; j < size; ++j) {
      for (int r = 0; r < R; ++r) {
        y[r][k] += row[j] * z[r][j];
        y[r][j] += row[j] * z[r][k];
      }
    }
  }
}

// The first row of part `part` of `parts`, all of about the same number of entries.
inline int64_t triangle_row(int64_t size, int64_t part, int64_t parts) {
  if (part == parts) return size;
  const double rest = __builtin_sqrt(1 - double(part) / double(parts));
  return int64_t(double(size) * (1 - rest)) / kTriangleBlock * kTriangleBlock;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
