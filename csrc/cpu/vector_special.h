// log1p and erf on vectors; their errors are in the table of vector_math.h.

#pragma once

#include "cpu/vector_math.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

// 2 atanh(s) = 2s + s z R(z), z = s^2, s = f / (2 + f), 1 + f in [sqrt(1/2), sqrt(2)].
// Fit of the logarithm: 2^-30.2 (float), 2^-59.1 (double).
FASTDEQ_INLINE Vec<float> log_tail(Vec<float> z) {
  return z * polynomial(z, 0x1.55557ap-1f, 0x1.995ec2p-2f, 0x1.31e3fep-2f);
}
FASTDEQ_INLINE Vec<double> log_tail(Vec<double> z) {
  return z * polynomial(z, 0x1.5555555555593p-1, 0x1.999999997f8a5p-2, 0x1.249249423e6f5p-2,
                        0x1.c71c51c65a24fp-3, 0x1.74664d79aab9ep-3, 0x1.39a02ea5f734ep-3,
                        0x1.2f15bd9c45440p-3);
}

// log(1 + x) = k ln2 + log(1 + f), 2^k (1 + f) = 1 + x. f is computed from x, not from the rounded
// 1 + x: f = 2^-k x + (2^-k - 1).
template <class T>
FASTDEQ_INLINE Vec<T> log1p_lanes(Vec<T> x) {
  using F = Format<T>;
  using U = typename VecOf<T>::uelement;
  constexpr T kSqrtHalf = T(0x1.6a09e667f3bcdp-1);
  const U offset = (F::kBias << F::kMantissa) - __builtin_bit_cast(U, kSqrtHalf);
  const Vec<T> u = x + T(1);
  const UVec<T> biased = (bits(u) + offset) >> F::kMantissa;  // k + bias
  const U integer = __builtin_bit_cast(U, T(U(1) << F::kMantissa));
  const Vec<T> k = floats(biased | integer) - T((U(1) << F::kMantissa) + F::kBias);
  // 2^-k may be below the normal range and its exponent below the field: 2^(2-k) / 4.
  const Vec<T> scale = floats((U(2 * F::kBias + 2) - biased) << F::kMantissa) * T(0.25);
  const Vec<T> f = x * scale + (scale - T(1));
  const Vec<T> s = f / (f + T(2)), square = f * f * T(0.5);
  const Vec<T> tail = s * (square + log_tail(s * s)) + k * F::kLn2Low;
  Vec<T> y = k * F::kLn2High - ((square - tail) - f);
  y = select(x == F::kInf, x, copysign(y, x));
  y = select(x == T(-1), splat(-F::kInf), y);
  return select(x < T(-1), splat(T(__builtin_nan(""))), y);
}

// erf(x) = tanh(x + x R(x^2)), R = atanh(erf(x)) / x - 1 as a quotient of polynomials with positive
// coefficients. The error of the argument is damped as in tanh_positive, all the more as x grows.
// Fit of erf: 2^-27.0 on [0, 3.95] (float), 2^-55.9 on [0, 5.95] (double); linearised weighted
// least squares, not Remez.
FASTDEQ_INLINE Vec<float> erf_argument(Vec<float> z) {
  return polynomial(z, 0x1.06eba8p-3f, 0x1.f75cf6p-4f, 0x1.363e28p-6f, 0x1.e55b38p-10f) /
         polynomial(z, 1.0f, 0x1.40f354p-3f, 0x1.83d384p-6f, 0x1.53f6a2p-12f);
}
FASTDEQ_INLINE Vec<double> erf_argument(Vec<double> z) {
  return polynomial(z, 0x1.06eba8214db69p-3, 0x1.49e537b8bf1f6p-3, 0x1.0277798b6dd7ap-4,
                    0x1.0060a0e9ba496p-6, 0x1.51792a5a99b24p-9, 0x1.38e6aed8cfb1fp-12,
                    0x1.976e29951f6bcp-16, 0x1.631b95048fb36p-20, 0x1.7c7aacbcd6100p-25,
                    0x1.a8f8478c2fbf4p-32) /
         polynomial(z, 1.0, 0x1.d118646c566c8p-2, 0x1.0956225540609p-3, 0x1.812c532dc9ad9p-6,
                    0x1.8d67baaab111bp-9, 0x1.2102ea278fe86p-12, 0x1.1f740a72bc0d8p-16,
                    0x1.7b9bf1a19fd0cp-21, 0x1.9f9c68757bbb1p-27, 0x1.c04d77b89c861p-36);
}
template <class T>
FASTDEQ_INLINE Vec<T> erf_lanes(Vec<T> x) {
  const Vec<T> a = min(abs(x), Format<T>::kErfMax);
  const Vec<T> argument = a * erf_argument(a * a) + a;
  return with_sign_of(x, tanh_positive<T>(min(argument, Format<T>::kTanhMax)));
}

FASTDEQ_OVERLOADS(log1p)
FASTDEQ_OVERLOADS(erf)
#undef FASTDEQ_OVERLOADS

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
