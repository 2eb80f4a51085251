// Fixed-width vectors of float and double on GCC's and Clang's vector extensions.
//
// One source is compiled once per instruction set: a translation unit includes the standard and
// intrinsics headers it needs, switches the target, defines the two macros, and includes this.
//
//   #include <immintrin.h>
//   #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
//   #define FASTDEQ_TARGET avx512      // everything lives in fastdeq::avx512
//   #define FASTDEQ_VECTOR_BYTES 64    // 64: AVX-512 F, BW, DQ, VL; 32: AVX2, FMA; 16: any machine
//
// On x86-64 a width of 64 or 32 promises those instructions. FMA comes from -ffp-contract=fast, the
// default of GCC; nothing here depends on it, and nothing here survives -ffast-math.
//
//   Vec<T>        kLanes<T> values of T: + - * / and comparisons act per lane, scalars broadcast
//   IVec, UVec    signed and unsigned integers of the same width; what Vec's comparisons give is
//   IVec bits, floats  reinterpret, no conversion
//
// No function of the standard library is called, so that no inline function compiled for one
// instruction set can be linked into the code of another.

#pragma once

#ifdef __FAST_MATH__
#error "NaN, signed zero and the order of operations matter here: no -ffast-math"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors as arguments of functions that are always inlined have no calling convention to warn of.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define FASTDEQ_INLINE inline __attribute__((always_inline))

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <class T>
struct VecOf;

template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTDEQ_VECTOR_BYTES)));
  typedef int itype __attribute__((vector_size(FASTDEQ_VECTOR_BYTES)));
  typedef unsigned utype __attribute__((vector_size(FASTDEQ_VECTOR_BYTES)));
  typedef int ielement;
  typedef unsigned uelement;
};

template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTDEQ_VECTOR_BYTES)));
  typedef long long itype __attribute__((vector_size(FASTDEQ_VECTOR_BYTES)));
  typedef unsigned long long utype __attribute__((vector_size(FASTDEQ_VECTOR_BYTES)));
  typedef long long ielement;
  typedef unsigned long long uelement;
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IVec = typename VecOf<T>::itype;
template <class T>
using UVec = typename VecOf<T>::utype;
template <class T>
constexpr int kLanes = FASTDEQ_VECTOR_BYTES / int(sizeof(T));

template <class T>
FASTDEQ_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x, also for -0 and NaN, and folds to a broadcast
}

// Memory: any alignment.

template <class T>
FASTDEQ_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FASTDEQ_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first n lanes, 0 <= n <= kLanes<T>: load gives zeros beyond them, and neither touches memory
// beyond them.

#if defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 64

FASTDEQ_INLINE Vec<float> load_partial(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FASTDEQ_INLINE Vec<double> load_partial(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
FASTDEQ_INLINE void store_partial(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
FASTDEQ_INLINE void store_partial(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}

#elif defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 32

FASTDEQ_INLINE IVec<float> first_lanes(float, int n) {
  return IVec<float>{0, 1, 2, 3, 4, 5, 6, 7} < n;
}
FASTDEQ_INLINE IVec<double> first_lanes(double, int n) {
  return IVec<double>{0, 1, 2, 3} < (long long)n;
}
FASTDEQ_INLINE Vec<float> load_partial(const float* p, int n) {
  return (Vec<float>)_mm256_maskload_ps(p, (__m256i)first_lanes(0.0f, n));
}
FASTDEQ_INLINE Vec<double> load_partial(const double* p, int n) {
  return (Vec<double>)_mm256_maskload_pd(p, (__m256i)first_lanes(0.0, n));
}
FASTDEQ_INLINE void store_partial(float* p, Vec<float> v, int n) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes(0.0f, n), (__m256)v);
}
FASTDEQ_INLINE void store_partial(double* p, Vec<double> v, int n) {
  _mm256_maskstore_pd(p, (__m256i)first_lanes(0.0, n), (__m256d)v);
}

#else

template <class T>
FASTDEQ_INLINE Vec<T> load_partial(const T* p, int n) {
  Vec<T> v = {};
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
}
template <class T>
FASTDEQ_INLINE void store_partial(T* p, Vec<T> v, int n) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < n) p[i] = v[i];
  }
}

#endif

// Bits and selection.

FASTDEQ_INLINE UVec<float> bits(Vec<float> v) { return (UVec<float>)v; }
FASTDEQ_INLINE UVec<double> bits(Vec<double> v) { return (UVec<double>)v; }
FASTDEQ_INLINE Vec<float> floats(UVec<float> v) { return (Vec<float>)v; }
FASTDEQ_INLINE Vec<double> floats(UVec<double> v) { return (Vec<double>)v; }

FASTDEQ_INLINE Vec<float> select(IVec<float> mask, Vec<float> yes, Vec<float> no) {
  return mask ? yes : no;
}
FASTDEQ_INLINE Vec<double> select(IVec<double> mask, Vec<double> yes, Vec<double> no) {
  return mask ? yes : no;
}

// NaN in v survives both; NaN in bound is ignored. That is minps(bound, v), which GCC recognises in
// bound < v ? bound : v only now and then.
#if defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 64
FASTDEQ_INLINE Vec<float> min(Vec<float> v, Vec<float> bound) {
  return (Vec<float>)_mm512_maskz_min_ps(__mmask16(-1), (__m512)bound, (__m512)v);
}
FASTDEQ_INLINE Vec<double> min(Vec<double> v, Vec<double> bound) {
  return (Vec<double>)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)bound, (__m512d)v);
}
FASTDEQ_INLINE Vec<float> max(Vec<float> v, Vec<float> bound) {
  return (Vec<float>)_mm512_maskz_max_ps(__mmask16(-1), (__m512)bound, (__m512)v);
}
FASTDEQ_INLINE Vec<double> max(Vec<double> v, Vec<double> bound) {
  return (Vec<double>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)bound, (__m512d)v);
}
#elif defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 32
FASTDEQ_INLINE Vec<float> min(Vec<float> v, Vec<float> bound) {
  return (Vec<float>)_mm256_min_ps((__m256)bound, (__m256)v);
}
FASTDEQ_INLINE Vec<double> min(Vec<double> v, Vec<double> bound) {
  return (Vec<double>)_mm256_min_pd((__m256d)bound, (__m256d)v);
}
FASTDEQ_INLINE Vec<float> max(Vec<float> v, Vec<float> bound) {
  return (Vec<float>)_mm256_max_ps((__m256)bound, (__m256)v);
}
FASTDEQ_INLINE Vec<double> max(Vec<double> v, Vec<double> bound) {
  return (Vec<double>)_mm256_max_pd((__m256d)bound, (__m256d)v);
}
#else
FASTDEQ_INLINE Vec<float> min(Vec<float> v, Vec<float> bound) { return bound < v ? bound : v; }
FASTDEQ_INLINE Vec<double> min(Vec<double> v, Vec<double> bound) { return bound < v ? bound : v; }
FASTDEQ_INLINE Vec<float> max(Vec<float> v, Vec<float> bound) { return bound > v ? bound : v; }
FASTDEQ_INLINE Vec<double> max(Vec<double> v, Vec<double> bound) { return bound > v ? bound : v; }
#endif
FASTDEQ_INLINE Vec<float> min(Vec<float> v, float bound) { return min(v, splat(bound)); }
FASTDEQ_INLINE Vec<double> min(Vec<double> v, double bound) { return min(v, splat(bound)); }
FASTDEQ_INLINE Vec<float> max(Vec<float> v, float bound) { return max(v, splat(bound)); }
FASTDEQ_INLINE Vec<double> max(Vec<double> v, double bound) { return max(v, splat(bound)); }

FASTDEQ_INLINE Vec<float> abs(Vec<float> v) { return floats(bits(v) & 0x7fffffffu); }
FASTDEQ_INLINE Vec<double> abs(Vec<double> v) { return floats(bits(v) & 0x7fffffffffffffffull); }

// |magnitude| with the sign of sign; and the same, an instruction shorter, for magnitude >= 0.
FASTDEQ_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  return floats((bits(magnitude) & 0x7fffffffu) | (bits(sign) & 0x80000000u));
}
FASTDEQ_INLINE Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return floats((bits(magnitude) & 0x7fffffffffffffffull) | (bits(sign) & 0x8000000000000000ull));
}
FASTDEQ_INLINE Vec<float> with_sign_of(Vec<float> sign, Vec<float> magnitude) {
  return floats(bits(magnitude) | (bits(sign) & 0x80000000u));
}
FASTDEQ_INLINE Vec<double> with_sign_of(Vec<double> sign, Vec<double> magnitude) {
  return floats(bits(magnitude) | (bits(sign) & 0x8000000000000000ull));
}

// Float to double, for sums that must not lose digits: the lower and the upper half of the lanes.

#if defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 64
// The unmasked versions of these intrinsics read an undefined register, of which GCC 12 warns.
FASTDEQ_INLINE __m256d lower_256(__m512d v) {
  return _mm512_maskz_extractf64x4_pd(__mmask8(-1), v, 0);
}
FASTDEQ_INLINE __m256d upper_256(__m512d v) {
  return _mm512_maskz_extractf64x4_pd(__mmask8(-1), v, 1);
}
FASTDEQ_INLINE Vec<double> lower_half(Vec<float> v) {
  return (Vec<double>)_mm512_maskz_cvtps_pd(__mmask8(-1), _mm256_castpd_ps(lower_256((__m512d)v)));
}
FASTDEQ_INLINE Vec<double> upper_half(Vec<float> v) {
  return (Vec<double>)_mm512_maskz_cvtps_pd(__mmask8(-1), _mm256_castpd_ps(upper_256((__m512d)v)));
}
#elif defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 32
FASTDEQ_INLINE Vec<double> lower_half(Vec<float> v) {
  return (Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
}
FASTDEQ_INLINE Vec<double> upper_half(Vec<float> v) {
  return (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
}
#elif defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 16
FASTDEQ_INLINE Vec<double> lower_half(Vec<float> v) { return (Vec<double>)_mm_cvtps_pd((__m128)v); }
FASTDEQ_INLINE Vec<double> upper_half(Vec<float> v) {
  return (Vec<double>)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
}
#else
FASTDEQ_INLINE Vec<double> lower_half(Vec<float> v) {
  Vec<double> r;
  for (int i = 0; i < kLanes<double>; ++i) r[i] = double(v[i]);
  return r;
}
FASTDEQ_INLINE Vec<double> upper_half(Vec<float> v) {
  Vec<double> r;
  for (int i = 0; i < kLanes<double>; ++i) r[i] = double(v[i + kLanes<double>]);
  return r;
}
#endif

// The sum of all lanes, in double throughout.
FASTDEQ_INLINE double sum(Vec<double> v) {
#if defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 64
  const __m256d four = _mm256_add_pd(lower_256((__m512d)v), upper_256((__m512d)v));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return two[0] + two[1];
#elif defined(__x86_64__) && FASTDEQ_VECTOR_BYTES == 32
  const __m128d two =
      _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return two[0] + two[1];
#else
  double total = v[0];
  for (int i = 1; i < kLanes<double>; ++i) total += v[i];
  return total;
#endif
}
FASTDEQ_INLINE double sum(Vec<float> v) { return sum(lower_half(v) + upper_half(v)); }

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
