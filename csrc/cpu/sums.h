// Sums over a row in double, vectors of float being widened before they are added, and the square
// root.

#pragma once

#include "cpu/vector.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
struct Sum {
  Vec<double> low = {}, high = {};

  FASTDEQ_INLINE void add(Vec<T> v) {
    if constexpr (sizeof(T) == 8) {
      low += v;
    } else {
      low += lower_half(v);
      high += upper_half(v);
    }
  }
  FASTDEQ_INLINE double total() const { return sum(low + high); }
};

// Products of float are taken in double, where they are exact.
template <typename T>
FASTDEQ_INLINE void add_product(Sum<T>& sum, Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 8) {
    sum.low += a * b;
  } else {
    sum.low += lower_half(a) * lower_half(b);
    sum.high += upper_half(a) * upper_half(b);
  }
}

template <typename T>
FASTDEQ_INLINE void add_square(Sum<T>& sum, Vec<T> v) {
  add_product(sum, v, v);
}

// The largest of all lanes, which are not NaN.
template <typename T>
FASTDEQ_INLINE T largest_lane(Vec<T> v) {
#if defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m256 eight = _mm256_max_ps(_mm256_castpd_ps(lower_256((__m512d)v)),
                                       _mm256_castpd_ps(upper_256((__m512d)v)));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
  }
#endif
  T most = v[0];
  for (int i = 1; i < kLanes<T>; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

#if defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 64
FASTDEQ_INLINE Vec<float> sqrt(Vec<float> v) {
  return (Vec<float>)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)v);
}
FASTDEQ_INLINE Vec<double> sqrt(Vec<double> v) {
  return (Vec<double>)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)v);
}
#elif defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 32
FASTDEQ_INLINE Vec<float> sqrt(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
FASTDEQ_INLINE Vec<double> sqrt(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
#elif defined(__x86_64__)
FASTDEQ_INLINE Vec<float> sqrt(Vec<float> v) { return (Vec<float>)_mm_sqrt_ps((__m128)v); }
FASTDEQ_INLINE Vec<double> sqrt(Vec<double> v) { return (Vec<double>)_mm_sqrt_pd((__m128d)v); }
#else
FASTDEQ_INLINE Vec<float> sqrt(Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
FASTDEQ_INLINE Vec<double> sqrt(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif

// Zeros from lane n on.
template <typename T>
FASTDEQ_INLINE Vec<T> keep_first(Vec<T> v, int64_t n) {
  for (int64_t i = n; i < kLanes<T>; ++i) v[i] = 0;
  return v;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
