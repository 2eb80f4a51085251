// The activations of fastdeq/activations.py on the GPU: value(p) = phi(p) and slope(p) = phi'(p) of
// one float or double, by the same formulas, with the same results for NaN and +-inf.
//
// FASTDEQ_FOR_EACH_ACTIVATION(F) expands to F("identity", Identity) F("relu", Relu) ... in the
// order of the table there; activate(index, p) and activation_slope(index, p) switch at run time,
// where an index is the same for a whole block and costs one branch next to a product of d terms.

#pragma once

#include <cmath>

#include "common/activation_names.h"
#include "common/solve_options.h"

namespace fastdeq {
namespace cuda {

template <typename T>
FASTDEQ_HOST_DEVICE inline T logistic(T p) {
  return T(1) / (T(1) + std::exp(-p));
}

struct Identity {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p;
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T) {
    return T(1);
  }
};

struct Relu {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p < T(0) ? T(0) : p;  // NaN stays
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    return p > T(0) ? T(1) : T(0);
  }
};

struct LeakyRelu {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p > T(0) ? p : p * T(0.01);
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    return p > T(0) ? T(1) : T(0.01);
  }
};

struct Tanh {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return std::tanh(p);
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    const T t = std::tanh(p);
    return T(1) - t * t;
  }
};

struct Hardtanh {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p < T(-1) ? T(-1) : p > T(1) ? T(1) : p;  // NaN stays
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    return std::fabs(p) < T(1) ? T(1) : T(0);
  }
};

struct Sigmoid {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return logistic(p);
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    const T s = logistic(p);
    return s * (T(1) - s);
  }
};

struct Softplus {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p > T(20) ? p : std::log1p(std::exp(p));
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    return logistic(p);
  }
};

struct Elu {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p > T(0) ? p : std::expm1(p);
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    return p > T(0) ? T(1) : std::exp(p);
  }
};

struct Gelu {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T cdf(T p) {
    return T(0.5) * (T(1) + std::erf(p * T(0.70710678118654752440)));
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p * cdf(p);
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    const T density = std::exp(T(-0.5) * p * p) * T(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return cdf(p) + p * density;
  }
};

struct Silu {
  template <typename T>
  static FASTDEQ_HOST_DEVICE T value(T p) {
    return p * logistic(p);
  }
  template <typename T>
  static FASTDEQ_HOST_DEVICE T slope(T p) {
    const T s = logistic(p);
    return s * (T(1) + p * (T(1) - s));
  }
};

// The indices of the activations, for switches.
enum ActivationIndex : int {
#define FASTDEQ_INDEX(name, functor) k##functor,
  FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_INDEX)
#undef FASTDEQ_INDEX
};

template <typename T>
FASTDEQ_HOST_DEVICE inline T activate(int index, T p) {
  switch (index) {
#define FASTDEQ_CASE(name, functor) \
  case k##functor:                  \
    return functor::value(p);
    FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_CASE)
#undef FASTDEQ_CASE
    default:
      return p;
  }
}

template <typename T>
FASTDEQ_HOST_DEVICE inline T activation_slope(int index, T p) {
  switch (index) {
#define FASTDEQ_CASE(name, functor) \
  case k##functor:                  \
    return functor::slope(p);
    FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_CASE)
#undef FASTDEQ_CASE
    default:
      return p;
  }
}

}  // namespace cuda
}  // namespace fastdeq
