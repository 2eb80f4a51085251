// What one evaluation of a general map means for the entries of one sample: sums for the judgement,
// then the step. Specification: fastdeq/solvers/loop.py and the solvers beside it.
//
//   v, z        value f(z) and point z, of one dtype; g = v - z
//   first pass  |g|^2 and |v|^2; with a history also the products of g with the c residuals in it,
//               a row of the Gram matrix
//   second      the next point; v and g in the history, the point as the best iterate
//
// Per entry two numbers are read in the first pass, and two written in the second, where v and z
// are still in the cache; a history adds c reads to the first, and c (2 c where damping < 1) and
// two writes to the second. Products are summed in double: the differences of a Gram matrix cancel.

#pragma once

#include "cpu/iteration_task.h"
#include "cpu/sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr int64_t kBlock = 1024;  // entries that stay in the nearest cache
constexpr int kTogether = 4;      // evaluations of the history that one pass reads

// body(j, load, store) for vectors of entries begin <= j < end, where load(p) reads from p + j and
// store(p, v) writes; no memory beyond `end` is touched, and lanes there are 0.
template <typename T, typename Body>
FASTDEQ_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t j = begin;
  for (; j + kLanes<T> <= end; j += kLanes<T>) {
    body(
        j,
        [j](const T* p)
            __attribute__((always_inline)) { return fastdeq::FASTDEQ_TARGET::load(p + j); },
        [j](T* p, Vec<T> v)
            __attribute__((always_inline)) { fastdeq::FASTDEQ_TARGET::store(p + j, v); });
  }
  if (j == end) return;
  const int n = int(end - j);
  body(
      j, [j, n](const T* p) __attribute__((always_inline)) { return load_partial(p + j, n); },
      [j, n](T* p, Vec<T> v) __attribute__((always_inline)) { store_partial(p + j, v, n); });
}

template <typename T, typename Load>
FASTDEQ_INLINE Vec<T> value_of(const RowEvaluation<T>& e, Load load) {
  const Vec<T> value = e.value == nullptr ? Vec<T>{} : load(e.value);
  return e.offset == nullptr ? value : value + splat(e.scale) * load(e.offset);
}

// body.operator()<c>() with c the lesser of count and kTogether.
template <typename Body>
FASTDEQ_INLINE void at_most_together(int64_t count, Body body) {
  static_assert(kTogether == 4);
  if (count >= 4) return body.template operator()<4>();
  if (count == 3) return body.template operator()<3>();
  if (count == 2) return body.template operator()<2>();
  if (count == 1) return body.template operator()<1>();
  return body.template operator()<0>();
}

// A vector as doubles: one, or the lower and the upper half of the lanes.
template <typename T>
struct Wide {
  Vec<double> low, high;
};

template <typename T>
FASTDEQ_INLINE Wide<T> widened(Vec<T> v) {
  if constexpr (sizeof(T) == 8) {
    return {v, Vec<double>{}};
  } else {
    return {lower_half(v), upper_half(v)};
  }
}

// Adds the product of two vectors.
template <typename T>
FASTDEQ_INLINE void add_product(Sum<T>& sum, const Wide<T>& a, const Wide<T>& b) {
  sum.low += a.low * b.low;
  if constexpr (sizeof(T) == 4) sum.high += a.high * b.high;
}

// The sums of entries from <= j < to with the first c residuals in the history; the newest one, in
// double, goes into `block` where that is not null.
template <int c, typename T>
void measure_first(const RowEvaluation<T>& e, int64_t from, int64_t to, Sum<T>& residual,
                   Sum<T>& size, double* block, double* sums) {
  Sum<T> products[c + 1];
  for_vectors<T>(from, to, [&](int64_t j, auto load, auto) __attribute__((always_inline)) {
    const Vec<T> value = value_of(e, load);
    const Wide<T> g = widened<T>(value - load(e.point));
    add_product(residual, g, g);
    add_square(size, value);
    for (int i = 0; i < c; ++i) add_product(products[i], g, widened<T>(load(e.old_g[i])));
    if constexpr (c == kTogether) {
      if (block == nullptr) return;
      double* const at = block + (j - from);
      fastdeq::FASTDEQ_TARGET::store(at, g.low);
      if constexpr (sizeof(T) == 4) fastdeq::FASTDEQ_TARGET::store(at + kLanes<double>, g.high);
    }
  });
  for (int i = 0; i < c; ++i) sums[i] += products[i].total();
}

// The products with the next c.
template <int c, typename T>
void measure_more(const T* const* old, int64_t from, int64_t to, const double* block,
                  double* sums) {
  Sum<T> products[c + 1];
  for_vectors<T>(from, to, [&](int64_t j, auto load, auto) __attribute__((always_inline)) {
    const double* const at = block + (j - from);
    Wide<T> g;
    g.low = fastdeq::FASTDEQ_TARGET::load(at);
    if constexpr (sizeof(T) == 4) g.high = fastdeq::FASTDEQ_TARGET::load(at + kLanes<double>);
    for (int i = 0; i < c; ++i) add_product(products[i], g, widened<T>(load(old[i])));
  });
  for (int i = 0; i < c; ++i) sums[i] += products[i].total();
}

template <typename T>
void measure(const RowEvaluation<T>& e, int64_t begin, int64_t end, double* sums) {
  Sum<T> residual, size;
  alignas(64) double block[kBlock];  // of g
  double* const products = sums + kFirstProduct;
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    at_most_together(e.ages, [&]<int c>() {
      double* const kept = e.ages > c ? block : nullptr;
      measure_first<c>(e, from, to, residual, size, kept, products);
    });
    for (int64_t age = kTogether; age < e.ages; age += kTogether) {
      at_most_together(e.ages - age, [&]<int c>() {
        measure_more<c>(e.old_g + age, from, to, block, products + age);
      });
    }
  }
  sums[kResidualSquare] += residual.total();
  sums[kSizeSquare] += size.total();
}

// The entries of the next point are next(load, value, point).
template <typename T, typename Next>
FASTDEQ_INLINE void write_step(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t from,
                               int64_t to, Next next) {
  for_vectors<T>(from, to, [&](int64_t, auto load, auto store) __attribute__((always_inline)) {
    const Vec<T> point = load(e.point), value = value_of(e, load);
    const Vec<T> after = next(load, value, point);
    if (s.best != nullptr) store(s.best, point);
    if (s.f != nullptr) {
      store(s.f, value);
      store(s.g, value - point);
    }
    store(s.next, after);
  });
}

// Some evaluations of the history, with their weights.
template <typename T>
struct Mixed {
  int count = 0;
  const T* f[kTogether];
  const T* g[kTogether];
  T weight[kTogether];
};

// z - sum gamma_i (f - f_i) + (1 - damping) sum gamma_i (g - g_i) of the c evaluations in m.
template <int c, bool damps, typename T, typename Load>
FASTDEQ_INLINE Vec<T> mix(const Mixed<T>& m, Load load, Vec<T> z, Vec<T> f, Vec<T> g,
                          Vec<T> undamped) {
  for (int i = 0; i < c; ++i) {
    Vec<T> difference = f - load(m.f[i]);
    if constexpr (damps) difference -= undamped * (g - load(m.g[i]));
    z -= splat(m.weight[i]) * difference;
  }
  return z;
}

// f - sum gamma_i (f - f_i) - (1 - damping) (g - sum gamma_i (g - g_i)), newest first.
template <bool damps, typename T>
void mixing_step(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t begin, int64_t end) {
  alignas(64) T block[kBlock];  // sums over all but the last evaluations
  const Vec<T> undamped = splat(T(1) - s.damping);
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    T* const partial = block - from;
    Mixed<T> m;
    bool first = true;
    const auto mixed = [&]<int c>(auto load, Vec<T> value,
                                  Vec<T> point) __attribute__((always_inline)) {
      const Vec<T> g = value - point;
      const Vec<T> plain = damps ? value - undamped * g : value;
      return mix<c, damps>(m, load, first ? plain : load(partial), value, g, undamped);
    };
    for (int64_t age = 0; age < e.ages; ++age) {
      if (T(s.gamma[age]) == 0) continue;  // an entry that is not used may hold anything
      if (m.count == kTogether) {
        for_vectors<T>(from, to,
                       [&](int64_t, auto load, auto store) __attribute__((always_inline)) {
                         const Vec<T> value = value_of(e, load), point = load(e.point);
                         store(partial, mixed.template operator()<kTogether>(load, value, point));
                       });
        m.count = 0;
        first = false;
      }
      m.f[m.count] = e.old_f[age];
      m.g[m.count] = e.old_g[age];
      m.weight[m.count++] = T(s.gamma[age]);
    }
    at_most_together(m.count, [&]<int c>() {
      write_step(e, s, from, to,
                 [&](auto load, Vec<T> value, Vec<T> point) __attribute__((always_inline)) {
                   return mixed.template operator()<c>(load, value, point);
                 });
    });
  }
}

template <typename T>
void heavy_ball_step(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t begin, int64_t end) {
  const Vec<T> omega = splat(T(s.omega)), momentum = splat(T(s.omega - 1));
  const bool first = s.omega == 1;
  for_vectors<T>(begin, end, [&](int64_t, auto load, auto store) __attribute__((always_inline)) {
    const Vec<T> point = load(e.point);
    Vec<T> change = omega * (value_of(e, load) - point);
    if (!first) change += momentum * load(s.last);  // else it may be anything, NaN included
    if (s.best != nullptr) store(s.best, point);
    store(s.last, change);
    store(s.next, point + change);
  });
}

template <typename T>
void take_step(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t begin, int64_t end) {
  const Vec<T> damping = splat(s.damping);
  if (s.next == nullptr) {
    for_vectors<T>(begin, end, [&](int64_t, auto load, auto store) __attribute__((always_inline)) {
      store(s.best, load(e.point));
    });
  } else if (s.step == Step::kMix) {
    s.damping == 1 ? mixing_step<false>(e, s, begin, end) : mixing_step<true>(e, s, begin, end);
  } else if (s.step == Step::kTakeBack) {
    write_step(e, s, begin, end, [&](auto load, Vec<T>, Vec<T>) __attribute__((always_inline)) {
      return load(e.old_f[0]);
    });
  } else if (s.step == Step::kHeavyBall) {
    heavy_ball_step(e, s, begin, end);
  } else if (s.damping == 1) {
    write_step(e, s, begin, end,
               [](auto, Vec<T> value, Vec<T>) __attribute__((always_inline)) { return value; });
  } else {
    write_step(e, s, begin, end,
               [&](auto, Vec<T> value, Vec<T> point)
                   __attribute__((always_inline)) { return point + damping * (value - point); });
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
