// Puts a sample into a slot, and its result where it belongs.

#pragma once

#include "cpu/epilogue.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
void reset_slot(const SolveTask<T>& task, Slot<T>& fresh, int64_t sample) {
  const Solver solver = task.options.solver;
  const bool structured = solver == Solver::kEnergy || solver == Solver::kMinres;
  reset(fresh, task.options);
  fresh.sample = sample;
  fresh.row_norm = fresh.largest = 1;
  fresh.entry = 0;
  fresh.mode = structured && !task.options.begins_with_momentum() ? Mode::kOpen : Mode::kSteps;
  fresh.schedule = {};
  if (task.low_precision) fresh.schedule.lowest = Products::kInt8;
  fresh.change_scale = fresh.next_scale = 1;
  fresh.restart_residual = __builtin_inf();
  fresh.vain_restarts = 0;
}

// Whether the sample starts at zero: it is not given another start, or one that is not finite.
template <typename T>
bool starts_at_zero(const SolveTask<T>& task, int64_t sample) {
  if (task.start == nullptr) return true;
  const T* from = task.start + sample * task.size;
  bool zero = true, finite = true;
  for (int64_t j = 0; j < task.size; ++j) {
    zero &= from[j] == 0;
    finite &= bool(__builtin_isfinite(from[j]));
  }
  return zero || !finite;
}

// Entries j and on of a row of the task, zeros beyond its end.
template <typename T>
FASTDEQ_INLINE Vec<T> load_row(const T* row, int64_t j, int64_t size) {
  return size - j < kLanes<T> ? load_partial(row + j, int(size - j)) : load(row + j);
}

// Whether all lanes are zero: of what comparisons gave, that none held.
template <typename T>
FASTDEQ_INLINE bool is_zero(IVec<T> v) {
  bool zero = true;
  for (int i = 0; i < kLanes<T>; ++i) zero &= v[i] == 0;
  return zero;
}

// Returns whether it starts at zero.
template <typename T>
bool begin(const SolveTask<T>& task, Slot<T>& fresh, int64_t sample) {
  reset_slot(task, fresh, sample);
  const int64_t size = task.size, offset = sample * size;
  const bool zero = starts_at_zero(task, sample), heavy = task.options.begins_with_momentum();
  const bool minres = task.options.solver == Solver::kMinres;
  const T* const injection = task.injection + offset;
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const Vec<T> start = zero ? splat(T(0)) : load_row(task.start + offset, j, size);
    store(fresh.injection + j, load_row(injection, j, size));
    store(fresh.point + j, start);
    store(fresh.best + j, start);
    store(fresh.best_pre + j, splat(T(0)));
    if (heavy) store(fresh.last + j, splat(T(0)));
    if (minres) store(fresh.work[0] + j, splat(T(0))), store(fresh.work[1] + j, splat(T(0)));
  }
  if (task.slope == nullptr) return zero;
  IVec<T> alive = {};
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const Vec<T> slope = load_row(task.slope + offset, j, size);
    store(fresh.slope + j, slope);
    alive |= slope != T(0);
  }
  if (is_zero<T>(alive)) {  // zeros, even where the gradient is not finite
    for (int64_t j = 0; j < size; j += kLanes<T>) store(fresh.injection + j, splat(T(0)));
  }
  return zero;
}

// Scales the injection g so that |D g| = 1, or less where |g| would leave the range of T: a linear
// solve is homogeneous, its stop test is not. Nothing depends on g where D is 0. False when the row
// is not finite; then the result is NaN.
template <typename T>
bool scale_to_unit(const SolveTask<T>& task, Slot<T>& fresh) {
  const int64_t size = task.size;
  T *const injection = fresh.injection, *const slope = fresh.slope;
  Vec<T> most = {}, most_g = {};
  IVec<T> infinite = {};
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const Vec<T> given = load(injection + j), d = load(slope + j);
    infinite |= given - given != T(0);  // NaN
    const Vec<T> g = select(d == T(0), splat(T(0)), given);
    most = max(most, abs(d) * abs(g));
    most_g = max(most_g, abs(g));
    store(injection + j, g);
  }
  if (!is_zero<T>(infinite)) {
    for (int64_t j = 0; j < size; ++j) fresh.best[j] = T(__builtin_nan(""));
    return false;
  }
  const T least = largest_lane<T>(most_g) * T(kLeastScale);
  T largest = largest_lane<T>(most);
  largest = largest > least ? largest : least;
  if (largest == 0) return true;
  // Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
  Sum<T> square;
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const Vec<T> g = load(injection + j) / splat(largest), entry = load(slope + j) * g;
    store(injection + j, g);
    square.add(entry * entry);
  }
  const double length = square.total();
  const T norm = length > 1 ? T(__builtin_sqrt(length)) : T(1);
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    store(injection + j, load(injection + j) / splat(norm));
  }
  fresh.row_norm = norm;
  fresh.largest = largest;
  return true;
}

template <typename T>
void end(const SolveTask<T>& task, const Slot<T>& slot, Status status) {
  const int64_t size = task.size, offset = slot.sample * size;
  // A step at a time, as the product of the two may overflow.
  const Vec<T> row_norm = splat(slot.row_norm), largest = splat(slot.largest);
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    const Vec<T> value = load(slot.best + j) * row_norm * largest;
    store_partial(task.value + offset + j, value, int(size - j < kLanes<T> ? size - j : kLanes<T>));
  }
  if (task.value_slope != nullptr && status == Status::kNonfinite) {
    for (int64_t j = 0; j < size; ++j) task.value_slope[offset + j] = 0;
  } else if (task.value_slope != nullptr) {
    activate(task.activation, 1, slot.best_pre, task.value_slope + offset, size);
  }
  task.status[slot.sample] = int8_t(status);
  task.iterations[slot.sample] = slot.iterations;
  task.residual[slot.sample] = slot.best_residual;
  const int counters = counters_of(task.options.solver);
  for (int i = 0; i < counters; ++i) task.rejects[slot.sample * counters + i] = slot.rejects[i];
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
