// Inner products in double, in C++ that any compiler vectorises.

#pragma once

#include <cstdint>

namespace fastdeq {

// Independent partial sums let the compiler use vector registers without reordering a sum.
template <typename T>
double dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t kLanes = 16;
  double partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) partial[l] += double(a[i + l]) * double(b[i + l]);
  }
  double sum = 0;
  for (; i < n; ++i) sum += double(a[i]) * double(b[i]);
  for (int64_t l = 0; l < kLanes; ++l) sum += partial[l];
  return sum;
}

}  // namespace fastdeq
