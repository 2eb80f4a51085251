// The activations of fastdeq/activations.py on vectors: value(p) = phi(p) and slope(p) = phi'(p) by
// the same formulas, with the same results for NaN. At +-inf they agree with the limits where those
// exist, but where the formula has inf times 0 the result is NaN, as it is in PyTorch (whose
// gelu(inf) is NaN in float32 as well, and here is inf).
//
// The monotone ones have their convex primitive as well, and say whether they have a slope
// everywhere.
//
// FASTDEQ_FOR_EACH_ACTIVATION(F) expands to F("identity", Identity) F("relu", Relu) ... in the
// order of the table there, for dispatchers.

#pragma once

#include "common/activation_names.h"
#include "cpu/vector_special.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

struct Identity {
  static constexpr bool kMonotone = true, kSmooth = true;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    return T(0.5) * p * p;
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return p;
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T>) {
    return splat(T(1));
  }
};

struct Relu {
  static constexpr bool kMonotone = true, kSmooth = false;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    return T(0.5) * p * max(p, T(0));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return max(p, T(0));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    return select(p > T(0), splat(T(1)), splat(T(0)));
  }
};

struct LeakyRelu {
  static constexpr bool kMonotone = true, kSmooth = false;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    return T(0.5) * p * value<T>(p);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return select(p > T(0), p, p * T(0.01));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    return select(p > T(0), splat(T(1)), splat(T(0.01)));
  }
};

struct Tanh {
  static constexpr bool kMonotone = true, kSmooth = true;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    const Vec<T> a = abs(p);
    return a + log1p(exp(T(-2) * a)) - T(0.69314718055994530942);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return tanh(p);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    const Vec<T> t = tanh(p);
    return T(1) - t * t;
  }
};

struct Hardtanh {
  static constexpr bool kMonotone = true, kSmooth = false;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    const Vec<T> a = abs(p);
    return select(a < T(1), T(0.5) * p * p, a - T(0.5));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return min(max(p, T(-1)), T(1));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    return select(abs(p) < T(1), splat(T(1)), splat(T(0)));
  }
};

struct Sigmoid {
  static constexpr bool kMonotone = true, kSmooth = true;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    return max(p, T(0)) + log1p(exp(-abs(p)));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return sigmoid(p);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    const Vec<T> s = sigmoid(p);
    return s * (T(1) - s);
  }
};

struct Softplus {
  static constexpr bool kMonotone = true, kSmooth = true;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    const Vec<T> u = log1p(exp(-abs(p))), u2 = u * u;  // see fastdeq/activations.py
    const Vec<T> odd =
        polynomial(u2, T(1.0 / 36), T(-1.0 / 3600), T(1.0 / 211680), T(-1.0 / 10886400),
                   T(1.0 / 526901760), T(-4.0647616451442256e-11));
    const Vec<T> below = u + T(0.25) * u2 + u * u2 * odd;
    return select(p > T(0), T(0.5) * p * p + T(1.6449340668482264365) - below, below);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return select(p > T(20), p, log1p(exp(p)));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    return sigmoid(p);
  }
};

struct Elu {
  static constexpr bool kMonotone = true, kSmooth = true;
  template <class T>
  static FASTDEQ_INLINE Vec<T> primitive(Vec<T> p) {
    return select(p > T(0), T(0.5) * p * p, expm1(min(p, T(0))) - p);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return select(p > T(0), p, expm1(p));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    return exp(min(p, T(0)));
  }
};

struct Gelu {
  static constexpr bool kMonotone = false;
  template <class T>
  static FASTDEQ_INLINE Vec<T> cdf(Vec<T> p) {
    return T(0.5) * (T(1) + erf(p * T(0.70710678118654752440)));
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return p * cdf<T>(p);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    const Vec<T> density = exp(T(-0.5) * p * p) * T(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return cdf<T>(p) + p * density;
  }
};

struct Silu {
  static constexpr bool kMonotone = false;
  template <class T>
  static FASTDEQ_INLINE Vec<T> value(Vec<T> p) {
    return p * sigmoid(p);
  }
  template <class T>
  static FASTDEQ_INLINE Vec<T> slope(Vec<T> p) {
    const Vec<T> s = sigmoid(p);
    return s * (T(1) + p * (T(1) - s));
  }
};

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
