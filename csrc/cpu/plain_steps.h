// Steps of one slot without a history, plain, damped and heavy-ball ones: after an evaluation at
// `at`, which stays, they replace the value by the next point. See fastdeq/solvers/heavy_ball.py.
//
//   damped      change = damping (value - point)
//   heavy ball  change = omega (value - point) + (omega - 1) (last change)
//
// Omega is known before the evaluation, so that one in low precision takes the step in its
// epilogue.

#pragma once

#include "cpu/slot.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
void damped_step(const SolveTask<T>& task, Slot<T>& slot, const T* at) {
  if (task.options.damping == 1) return;
  const Vec<T> damping = splat<T>(T(task.options.damping));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> z = load(at + j);
    store(slot.value + j, z + damping * (load(slot.value + j) - z));
  }
}

template <typename T>
void heavy_ball_step(const SolveTask<T>& task, Slot<T>& slot, const T* at, double omega) {
  const Vec<T> w = splat<T>(T(omega)), momentum = splat<T>(T(omega - 1));
  const bool first = omega == 1;  // the last change may then be anything, NaN included
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> point = load(at + j);
    Vec<T> change = w * (load(slot.value + j) - point);
    if (!first) change += momentum * load(slot.last + j);
    store(slot.value + j, point + change);
    store(slot.last + j, change);
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
