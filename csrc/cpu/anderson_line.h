// Anderson acceleration of one line; the algorithm of fastdeq/solvers/anderson.py.
//
//   f, g        value and residual g = f - point, in a ring of window + 1 slots
//   gamma       from solve_small on the Gram matrix of the g
//   next point  f_k - sum gamma_i (f_k - f_i) - (1 - damping) (g_k - sum gamma_i (g_k - g_i))
//
// Per step with c differences in use: c + 2 rows of g read for a row of the Gram matrix (in
// float64, where its differences cancel), c + 1 rows of f for the mixing, 2 written.

#pragma once

#include "epilogue.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
inline Vec<double> widen(const T* p) {
  if constexpr (sizeof(T) == 8) {
    return load(p);
  } else {
    typedef float Half __attribute__((vector_size(FASTDEQ_VECTOR_BYTES / 2)));
    typedef float Unaligned
        __attribute__((vector_size(FASTDEQ_VECTOR_BYTES / 2), aligned(4), may_alias));
    return __builtin_convertvector(Half(*reinterpret_cast<const Unaligned*>(p)), Vec<double>);
  }
}

template <typename T>
double dot(const T* a, const T* b, int64_t padded) {
  constexpr int64_t step = kLanes<double>;
  Vec<double> s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * step <= padded; i += 2 * step) {
    s0 += widen(a + i) * widen(b + i);
    s1 += widen(a + i + step) * widen(b + i + step);
  }
  for (; i < padded; i += step) s0 += widen(a + i) * widen(b + i);
  return sum(s0 + s1);
}

template <typename T>
void remember(const SolveTask<T>& task, const Line<T>& line, const T* at) {
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  T* f = line.f_history + line.slot * stride;
  T* g = line.g_history + line.slot * stride;
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> value = load(line.value + j);
    store(f + j, value);
    store(g + j, value - load(at + j));
  }
}

// Row and column `slot` of the Gram matrix: products with the entries in use.
template <typename T>
void extend_gram(const SolveTask<T>& task, Line<T>& line) {
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  const int64_t slots = task.window + 1;
  const T* newest = line.g_history + line.slot * stride;
  for (int64_t age = 0; age <= line.count; ++age) {
    const int64_t j = slot_of(line.slot, age, slots);
    const double inner = dot(newest, line.g_history + j * stride, padded);
    line.gram[line.slot * slots + j] = inner;
    line.gram[j * slots + line.slot] = inner;
  }
}

template <typename T>
void mix(const SolveTask<T>& task, const Line<T>& line, const double* gamma, T* next) {
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  const int64_t slots = task.window + 1;
  const T* f_new = line.f_history + line.slot * stride;
  const T* g_new = line.g_history + line.slot * stride;
  const T undamped = T(1 - task.damping);
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> f = load(f_new + j), g = load(g_new + j);
    Vec<T> z = f - splat<T>(undamped) * g;
    for (int64_t age = 1; age <= line.count; ++age) {
      const T weight = T(gamma[age - 1]);
      if (weight == 0) continue;
      const int64_t offset = slot_of(line.slot, age, slots) * stride + j;
      Vec<T> difference = f - load(line.f_history + offset);
      if (undamped != 0) {
        difference -= splat<T>(undamped) * (g - load(line.g_history + offset));
      }
      z -= splat<T>(weight) * difference;
    }
    store(next + j, z);
  }
}

// The line was evaluated at `at`; replaces its value by the next point. False when it cannot go on.
// `small` has room for (window + 1)^2 + window + 1 numbers.
template <typename T>
bool anderson_step(const SolveTask<T>& task, Line<T>& line, const T* at, double* small) {
  const int64_t slots = task.window + 1;
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  // NaN compares false: "not (norm <= limit)" takes a step back that is not finite as well.
  const bool back = line.accelerated && !(line.norm <= task.safeguard * line.trusted_norm);
  if (!back && !__builtin_isfinite(line.norm)) return false;
  if (back) {
    // The plain step from the point before, which was not taken back: its value is in the slot
    // before. The history restarts.
    const T* trusted = line.f_history + slot_of(line.slot, 1, slots) * stride;
    for (int64_t j = 0; j < padded; j += kLanes<T>) store(line.value + j, load(trusted + j));
    ++line.rejects[0];
    line.accelerated = false;
    line.count = 0;
  } else {
    remember(task, line, at);
    extend_gram(task, line);
    double* gamma = small + slots * slots;
    const AndersonOutcome outcome =
        solve_small(line.gram, slots, 1, slots, line.slot, line.count, task.anderson, small, gamma);
    mix(task, line, gamma, line.value);
    line.trusted_norm = line.norm;
    line.rejects[1] += outcome.rejected;
    line.rejects[2] += outcome.dropped > 0;
    line.accelerated = !outcome.rejected && line.count > 0;
    line.count = line.count < task.window ? line.count + 1 : task.window;
  }
  line.slot = line.slot + 1 == slots ? 0 : line.slot + 1;
  return true;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
