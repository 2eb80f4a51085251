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

template <typename T, typename Load>
FASTDEQ_INLINE Vec<T> value_of(const RowEvaluation<T>& e, Load load) {
  const Vec<T> value = e.value == nullptr ? Vec<T>{} : load(e.value);
  return e.offset == nullptr ? value : value + splat(e.scale) * load(e.offset);
}

template <typename T>
void measure(const RowEvaluation<T>& e, int64_t begin, int64_t end, double* sums) {
  Sum<T> residual, size;
  alignas(64) T block[kBlock];  // of g
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
      const Vec<T> value = value_of(e, load), g = value - load(e.point);
      if (e.ages > 0) store(block - from, g);
      add_square(residual, g);
      add_square(size, value);
    });
    for (int64_t age = 0; age < e.ages; ++age) {
      const T* const old = e.old_g[age];
      Sum<T> product;
      for_vectors<T>(from, to, [&](auto load, auto) __attribute__((always_inline)) {
        add_product(product, load(block - from), load(old));
      });
      sums[kFirstProduct + age] += product.total();
    }
  }
  sums[kResidualSquare] += residual.total();
  sums[kSizeSquare] += size.total();
}

// f - sum gamma_i (f - f_i) - (1 - damping) (g - sum gamma_i (g - g_i)), newest first, into z.
template <typename T>
FASTDEQ_INLINE void mix_block(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t from,
                              int64_t to, T* z) {
  const Vec<T> undamped = splat(T(1) - s.damping);
  const bool damps = s.damping != 1;
  for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
    const Vec<T> f = value_of(e, load);
    store(z, damps ? f - undamped * (f - load(e.point)) : f);
  });
  for (int64_t age = 0; age < e.ages; ++age) {
    const Vec<T> weight = splat(T(s.gamma[age]));
    if (T(s.gamma[age]) == 0) continue;  // an entry that is not used may hold anything
    const T *const old_f = e.old_f[age], *const old_g = e.old_g[age];
    for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
      const Vec<T> f = value_of(e, load);
      Vec<T> difference = f - load(old_f);
      if (damps) difference -= undamped * ((f - load(e.point)) - load(old_g));
      store(z, load(z) - weight * difference);
    });
  }
}

template <typename T>
FASTDEQ_INLINE void step_block(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t from,
                               int64_t to, T* z) {
  const Vec<T> damping = splat(s.damping), omega = splat(T(s.omega));
  const Vec<T> momentum = splat(T(s.omega - 1));
  const bool damps = s.damping != 1, first = s.omega == 1;
  for_vectors<T>(from, to, [&](auto load, auto store) __attribute__((always_inline)) {
    const Vec<T> point = load(e.point), value = value_of(e, load);
    if (s.best != nullptr) store(s.best, point);
    if (s.next == nullptr) return;
    Vec<T> next = damps ? point + damping * (value - point) : value;
    if (s.step == Step::kMix) next = load(z);
    if (s.step == Step::kTakeBack) next = load(e.old_f[0]);
    if (s.step == Step::kHeavyBall) {
      Vec<T> change = omega * (value - point);
      if (!first) change += momentum * load(s.last);  // else it may be anything, NaN included
      store(s.last, change);
      next = point + change;
    }
    if (s.f != nullptr) {
      store(s.f, value);
      store(s.g, value - point);
    }
    store(s.next, next);
  });
}

template <typename T>
void take_step(const RowEvaluation<T>& e, const RowStep<T>& s, int64_t begin, int64_t end) {
  alignas(64) T block[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = from + kBlock < end ? from + kBlock : end;
    if (s.step == Step::kMix) mix_block(e, s, from, to, block - from);
    step_block(e, s, from, to, block - from);
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
