// Heavy-ball steps of one line; the algorithm of fastdeq/solvers/heavy_ball.py.
//
//   change = omega (value - point) + (omega - 1) (last change),   omega = 2 / (1 + sqrt(1 -
//   radius^2))
//
// Omega is known before the evaluation, so that a narrow one takes the step in its epilogue.

#pragma once

#include "line.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr double kLargestRadius = 0.98;
constexpr int kHalveWithin = 6;

// Takes in the residual norm of the evaluation just made, whose step is led by line.omega. Without
// `trusted` norms, now and before, the estimate of the radius stays. True when the residual does
// not halve in time.
template <typename T>
bool learn(Line<T>& line, bool trusted) {
  const double one = line.norm / line.previous_norm;
  const double three = __builtin_cbrt(line.norm / line.norms[1]);
  const double left = one < three ? one : three, before = line.led - 1;
  line.norms[1] = line.norms[0];
  line.norms[0] = line.previous_norm;
  if (trusted && line.iterations > 3 && left > __builtin_sqrt(before)) {  // false for NaN
    const double seen = (left * left + before) / (line.led * left);
    const double radius = seen < kLargestRadius ? seen : kLargestRadius;
    line.radius = radius > line.radius ? radius : line.radius;
  }
  line.led = line.omega;
  line.omega = 2 / (1 + __builtin_sqrt(1 - line.radius * line.radius));
  if (line.norm <= 0.5 * line.mark) {
    line.mark = line.norm;
    line.since = 0;
  } else {
    ++line.since;
  }
  return line.since >= kHalveWithin;
}

// The step after an evaluation at `at`, which stays: replaces the value by the next point. Comes
// before `learn`.
template <typename T>
void heavy_ball_step(const SolveTask<T>& task, Line<T>& line, const T* at) {
  const Vec<T> omega = splat<T>(T(line.omega)), momentum = splat<T>(T(line.omega - 1));
  const bool first = line.omega == 1;  // the last change may then be anything, NaN included
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> point = load(at + j);
    Vec<T> change = omega * (load(line.value + j) - point);
    if (!first) change += momentum * load(line.last + j);
    store(line.value + j, point + change);
    store(line.last + j, change);
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
