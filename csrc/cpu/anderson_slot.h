// Anderson acceleration of one slot; the algorithm of fastdeq/solvers/anderson.py.
//
//   f, g        value and residual g = f - point, in a ring of window + 1 entries
//   gamma       from solve_small on the Gram matrix of the g
//   next point  f_k - sum gamma_i (f_k - f_i) - (1 - damping) (g_k - sum gamma_i (g_k - g_i))
//
// Per step with c differences in use: c + 2 rows of g read for a row of the Gram matrix (in
// float64, where its differences cancel), c + 1 rows of f for the mixing, 2 written.

#pragma once

#include "cpu/epilogue.h"
#include "cpu/plain_steps.h"

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
void remember(const SolveTask<T>& task, const Slot<T>& slot, const T* at) {
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  T* f = slot.f_history + slot.entry * stride;
  T* g = slot.g_history + slot.entry * stride;
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> value = load(slot.value + j);
    store(f + j, value);
    store(g + j, value - load(at + j));
  }
}

// Row and column `newest` of the Gram matrix: products with the entries in use.
template <typename T>
void extend_gram(const SolveTask<T>& task, Slot<T>& slot, int64_t count) {
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  const int64_t entries = task.options.window + 1;
  const T* newest = slot.g_history + slot.entry * stride;
  for (int64_t age = 0; age <= count; ++age) {
    const int64_t j = entry_of(slot.entry, age, entries);
    const double inner = dot(newest, slot.g_history + j * stride, padded);
    slot.gram[slot.entry * entries + j] = inner;
    slot.gram[j * entries + slot.entry] = inner;
  }
}

template <typename T>
void mix(const SolveTask<T>& task, const Slot<T>& slot, int64_t count, const double* gamma,
         T* next) {
  const int64_t stride = stride_of<T>(task.size), padded = round_up<T>(task.size);
  const int64_t entries = task.options.window + 1;
  const T* f_new = slot.f_history + slot.entry * stride;
  const T* g_new = slot.g_history + slot.entry * stride;
  const T undamped = T(1 - task.options.damping);
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> f = load(f_new + j), g = load(g_new + j);
    Vec<T> z = f - splat<T>(undamped) * g;
    for (int64_t age = 1; age <= count; ++age) {
      const T weight = T(gamma[age - 1]);
      if (weight == 0) continue;
      const int64_t offset = entry_of(slot.entry, age, entries) * stride + j;
      Vec<T> difference = f - load(slot.f_history + offset);
      if (undamped != 0) {
        difference -= splat<T>(undamped) * (g - load(slot.g_history + offset));
      }
      z -= splat<T>(weight) * difference;
    }
    store(next + j, z);
  }
}

template <typename T>
void next_entry(const SolveTask<T>& task, Slot<T>& slot) {
  slot.entry = slot.entry == task.options.window ? 0 : slot.entry + 1;
}

// Step::kMix: the slot was evaluated at `at`, with `count` evaluations in the history before;
// replaces its value by the next point. `small` has room for small_bytes.
template <typename T>
void anderson_step(const SolveTask<T>& task, Slot<T>& slot, const T* at, int64_t count,
                   double* small) {
  const int64_t entries = task.options.window + 1;
  remember(task, slot, at);
  extend_gram(task, slot, count);
  double* const gamma = small + small_solve_doubles(task.options.window);
  const Gram gram{slot.gram, entries, 1, int(entries), int(slot.entry), int(count)};
  take_in(slot, solve_small(OneLane(), gram, task.options, small, gamma));
  mix(task, slot, count, gamma, slot.value);
  next_entry(task, slot);
}

// Step::kRefill: the same with the plain step.
template <typename T>
void refill_step(const SolveTask<T>& task, Slot<T>& slot, const T* at, int64_t count) {
  remember(task, slot, at);
  extend_gram(task, slot, count);
  damped_step(task, slot, at);
  next_entry(task, slot);
}

// Step::kTakeBack: the plain step from the point before, whose value is in the entry before. The
// history restarts.
template <typename T>
void take_back(const SolveTask<T>& task, Slot<T>& slot) {
  const int64_t before = entry_of(slot.entry, 1, task.options.window + 1);
  copy(task.size, slot.f_history + before * stride_of<T>(task.size), slot.value);
  next_entry(task, slot);
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
