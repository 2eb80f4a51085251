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
  fresh.change_scale = 1;
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

// Returns whether it starts at zero.
template <typename T>
bool begin(const SolveTask<T>& task, Slot<T>& fresh, int64_t sample) {
  reset_slot(task, fresh, sample);
  const int64_t size = task.size, offset = sample * size;
  const bool zero = starts_at_zero(task, sample);
  for (int64_t j = 0; j < size; ++j) {
    fresh.injection[j] = task.injection[offset + j];
    fresh.point[j] = fresh.best[j] = zero ? 0 : task.start[offset + j];
    fresh.best_pre[j] = 0;
    if (task.options.begins_with_momentum()) fresh.last[j] = 0;
    if (task.options.solver == Solver::kMinres) fresh.work[0][j] = fresh.work[1][j] = 0;
  }
  if (task.slope == nullptr) return zero;
  bool dead = true;
  for (int64_t j = 0; j < size; ++j) {
    fresh.slope[j] = task.slope[offset + j];
    dead &= fresh.slope[j] == 0;
  }
  if (dead) {  // zeros, even where the gradient is not finite
    for (int64_t j = 0; j < size; ++j) fresh.injection[j] = 0;
  }
  return zero;
}

// Scales the injection g so that |D g| = 1, or less where |g| would leave the range of T: a linear
// solve is homogeneous, its stop test is not. Nothing depends on g where D is 0. False when the row
// is not finite; then the result is NaN.
template <typename T>
bool scale_to_unit(const SolveTask<T>& task, Slot<T>& fresh) {
  const int64_t size = task.size;
  T largest = 0, largest_g = 0;
  bool finite = true;
  for (int64_t j = 0; j < size; ++j) {
    finite &= bool(__builtin_isfinite(fresh.injection[j]));
    if (fresh.slope[j] == 0) fresh.injection[j] = 0;
    const T g = T(__builtin_fabs(fresh.injection[j]));
    const T entry = T(__builtin_fabs(fresh.slope[j])) * g;
    largest = entry > largest ? entry : largest;
    largest_g = g > largest_g ? g : largest_g;
  }
  if (!finite) {
    for (int64_t j = 0; j < size; ++j) fresh.best[j] = T(__builtin_nan(""));
    return false;
  }
  const T least = largest_g * T(kLeastScale);
  largest = largest > least ? largest : least;
  if (largest == 0) return true;
  // Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
  double square = 0;
  for (int64_t j = 0; j < size; ++j) {
    fresh.injection[j] /= largest;
    const double entry = double(fresh.slope[j]) * double(fresh.injection[j]);
    square += entry * entry;
  }
  const double norm = square > 1 ? __builtin_sqrt(square) : 1;
  for (int64_t j = 0; j < size; ++j) fresh.injection[j] = T(fresh.injection[j] / norm);
  fresh.row_norm = T(norm);
  fresh.largest = largest;
  return true;
}

template <typename T>
void end(const SolveTask<T>& task, const Slot<T>& slot, Status status) {
  const int64_t size = task.size, offset = slot.sample * size;
  // A step at a time, as the product of the two may overflow.
  for (int64_t j = 0; j < size; ++j) {
    task.value[offset + j] = slot.best[j] * slot.row_norm * slot.largest;
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
