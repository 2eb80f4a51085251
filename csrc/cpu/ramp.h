// The precision ramp: which evaluations of a line may be made in bfloat16.
//
// A bfloat16 evaluation adds W (point - previous point) to the pre-activation, both rounded to
// bfloat16. The rounding error is relative to the change, so it shrinks with the iteration: next to
// a last evaluation in full precision, the anchor, at residual r, the pre-activations are off by
// about 1e-3 r / (1 - rate). After a drop by kDrop that is a sixth of the residual, and the next
// evaluation is made in full precision. Only those are verified: only they can end a solve or bring
// a new best iterate, so the reported residual never has a bfloat16 product in it.

#pragma once

#include "line.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr double kDrop = 400;
constexpr double kDropAccelerated = 30;
constexpr int kLongestLow = 25;  // evaluations of an accelerated line

// After an evaluation in full precision: the next anchor, equal drops on the way to the tolerance.
template <typename T>
void anchor(const SolveTask<T>& task, Line<T>& line, double relative) {
  if (line.anchored && !(relative <= 0.5 * line.anchor)) line.may_be_low = false;
  line.anchored = true;
  line.anchor = relative;
  line.since_anchor = 0;
  const double largest = line.plain ? kDrop : kDropAccelerated, target = 0.97 * task.tol;
  double drop = largest;
  if (target > 0 && relative > target) {
    const double total = __builtin_log(relative / target);
    drop = __builtin_exp(total / __builtin_ceil(total / __builtin_log(largest)));
  }
  line.goal = relative / drop;
}

// Whether the next evaluation may be in bfloat16; `relative` belongs to the one just made.
template <typename T>
bool next_is_low(const SolveTask<T>& task, Line<T>& line, double relative) {
  if (!line.may_be_low || line.iterations + 1 >= task.max_iter) return false;
  ++line.since_anchor;
  double rate = 0.9;  // unknown
  if (line.plain) {
    if (__builtin_isfinite(line.previous_norm)) rate = line.norm / line.previous_norm;
    if (!(rate <= 0.98)) return false;  // not getting on, or not finite
  } else if (line.since_anchor > 1) {
    rate = __builtin_pow(relative / line.anchor, 1.0 / (line.since_anchor - 1));
    if (line.since_anchor > kLongestLow || !(rate < 1)) rate = 0;
  }
  return relative * rate > line.goal;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
