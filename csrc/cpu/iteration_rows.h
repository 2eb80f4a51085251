// What one evaluation of a general map means for the entries of one sample: sums for the judgement,
// then the step. Specification: fastdeq/solvers/loop.py and the solvers beside it.
//
//   v, z        value f(z) and point z, of one dtype; g = v - z
//   first pass  |g|^2 and |v|^2; with a history also v and g into its newest entry, and the
//   products
//               of g with the c entries before it, a row of the Gram matrix
//   second      the point into the best iterate where it is that, and the next point
//
// Per entry: v and z are read once and two numbers are written with plain steps; a history adds
// c + 2 reads or writes to the first pass and c + 1 (2 c + 2 where damping < 1) to the second. Both
// go through blocks that stay in the nearest cache. Products are summed in double: the differences
// of a Gram matrix cancel.

#pragma once

#include "cpu/iteration_task.h"
#include "cpu/sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr int64_t kBlock = 1024;  // entries

// body(j, load, store) for vectors of entries begin <= j < end, where load(p) reads from p + j and
// store(p, v) writes; no memory beyond `end` is touched, and lanes there are 0.
template <typename T, typename Body>
FASTDEQ_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t j = begin;
  for (; j + kLanes<T> <= end; j += kLanes<T>) {
    body([j](const T* p)
             __attribute__((always_inline)) { return fastdeq::FASTDEQ_TARGET::load(p + j); },
         [j](T* p, Vec<T> v)
             __attribute__((always_inline)) { fastdeq::FASTDEQ_TARGET::store(p + j, v); });
  }
  if (j == end) return;
  const int n = int(end - j);
  body([j, n](const T* p) __attribute__((always_inline)) { return load_partial(p + j, n); },
       [j, n](T* p, Vec<T> v) __attribute__((always_inline)) { store_partial(p + j, v, n); });
}

template <typename T>
void measure(const RowEvaluation<T>& e, int64_t begin, int64_t end, double* sums) {
  Sum<T> residual, size;
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
      const Vec<T> value = load(e.value), g = value - load(e.point);
      if (e.f != nullptr) {
        store(e.f, value);
        store(e.g, g);
      }
      add_square(residual, g);
      add_square(size, value);
    });
    for (int64_t age = 0; age < e.ages; ++age) {
      const T* const old = e.old_g[age];
      Sum<T> product;
      for_vectors<T>(from, to, [&](auto load, auto) __attribute__((always_inline)) {
        add_product(product, load(e.g), load(old));
      });
      sums[kFirstProduct + age] += product.total();
    }
  }
  sums[kResidualSquare] += residual.total();
  sums[kSizeSquare] += size.total();
}

// z = f - sum gamma_i (f - f_i) - (1 - damping) (g - sum gamma_i (g - g_i)), newest first.
template <typename T>
FASTDEQ_INLINE void mix_block(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t from,
                              int64_t to) {
  const Vec<T> undamped = splat(T(1) - s.damping);
  const bool damps = s.damping != 1;
  const auto keep_best = [&](auto load, auto store) __attribute__((always_inline)) {
    if (s.best != nullptr) store(s.best, load(e.point));
  };
  if (s.best != nullptr) for_vectors<T>(from, to, keep_best);
  for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
    const Vec<T> f = load(e.f);
    store(s.next, damps ? f - undamped * load(e.g) : f);
  });
  for (int64_t age = 0; age < e.ages; ++age) {
    const T weight = T(s.gamma[age]);
    if (weight == 0) continue;
    const T *const old_f = e.old_f[age], *const old_g = e.old_g[age];
    for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
      Vec<T> difference = load(e.f) - load(old_f);
      if (damps) difference -= undamped * (load(e.g) - load(old_g));
      store(s.next, load(s.next) - splat(weight) * difference);
    });
  }
}

template <typename T>
void take_step(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t begin, int64_t end) {
  if (s.step == Step::kMix) {
    for (int64_t from = begin; from < end; from += kBlock) {
      mix_block(e, s, from, from + kBlock < end ? from + kBlock : end);
    }
    return;
  }
  const Vec<T> damping = splat(s.damping), omega = splat(T(s.omega));
  const Vec<T> momentum = splat(T(s.omega - 1));
  const bool damps = s.damping != 1, first = s.omega == 1;
  for_vectors<T>(begin, end, [&](auto load, auto store) __attribute__((always_inline)) {
    const Vec<T> point = load(e.point);
    if (s.best != nullptr) store(s.best, point);
    if (s.next == nullptr) return;
    Vec<T> next;
    if (s.step == Step::kTakeBack) {
      next = load(e.old_f[0]);
    } else if (s.step == Step::kHeavyBall) {
      Vec<T> change = omega * (load(e.value) - point);
      if (!first) change += momentum * load(s.last);  // else it may be anything, NaN included
      store(s.last, change);
      next = point + change;
    } else {
      next = load(e.value);
      if (damps) next = point + damping * (next - point);
    }
    store(s.next, next);
  });
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
