// The precision schedule: which evaluations of a sample have low-precision products, 8-bit
// or bfloat16 ones. In the terms of Krylov methods, low precision with reliable updates (residual
// replacement): G. Sleijpen and H. van der Vorst, Computing 56 (1996) 141; M. Clark et al., Comput.
// Phys. Commun. 181 (2010) 1517.
//
// A low-precision evaluation adds W (point - previous point) to the pre-activation, both factors
// rounded to 8 bits or to bfloat16. The rounding error is relative to the change, so it shrinks
// with the iteration: next to a last evaluation in full precision, at residual r,
// residuals are off by about 7e-3 r in 8 bits and 2e-3 r in bfloat16, on normally distributed
// numbers. After a drop to where that is felt the next evaluation is in full precision. Only
// those are verified: only they can end a solve or bring a new best iterate, so no reported
// residual has a low-precision product in it.
//
// Samples without acceleration begin in 8 bits, accelerated ones, whose history compares
// evaluations, in bfloat16. A sample for which 8 bits prove too coarse (outliers in a row of W, or
// in the change, spoil the common scale) goes on in bfloat16, one that gets nowhere in full
// precision.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/solve_options.h"

namespace fastdeq {

// The products of an evaluation.
enum class Products : int8_t { kFull, kBfloat16, kInt8 };

struct PrecisionSchedule {
  Products next = Products::kFull;    // of the next evaluation
  Products lowest = Products::kFull;  // that may be used
  double last_full = HUGE_VAL;        // relative residual at the last one in full precision
  double goal = HUGE_VAL;             // relative residual at which the next one is due
  double expected = HUGE_VAL;         // relative residual expected of the next evaluation
  int32_t since_full = 0;             // evaluations

  FASTDEQ_HOST_DEVICE Products low(bool plain) const {
    return lowest == Products::kInt8 && !plain ? Products::kBfloat16 : lowest;
  }

  // After an evaluation in full precision: the next goal, equal drops on the way to the
  // tolerance.
  FASTDEQ_HOST_DEVICE void set_goal(double tol, bool plain, double relative) {
    if (since_full > 0 && std::isfinite(goal)) {
      if (!(relative <= kRequiredGain * last_full)) {
        lowest = Products::kFull;
      } else if (lowest == Products::kInt8 && relative > kTrustFactor * expected) {
        lowest = Products::kBfloat16;
      }
    }
    last_full = relative;
    since_full = 0;
    const double largest = !plain                          ? kDropAccelerated
                           : low(plain) == Products::kInt8 ? kDropInt8
                                                           : kDropBfloat16;
    const double target = kTargetFraction * tol;
    double drop = largest;
    if (target > 0 && relative > target) {
      const double total = std::log(relative / target);
      drop = std::exp(total / std::ceil(total / std::log(largest)));
    }
    goal = relative / drop;
  }

  // Nearer to the goal rounding hides how fast the residual falls.
  FASTDEQ_HOST_DEVICE bool shows_rate(double relative) const {
    return relative > kTrustFactor * goal;
  }

  // Sets `next`. `relative` and `rate`, from the residual before to this one, belong to the
  // last evaluation; `count` evaluations are in the history of an accelerated sample.
  FASTDEQ_HOST_DEVICE void choose_next(bool plain, int32_t count, double relative, double rate) {
    if (!plain) {
      rate = since_full > 0 ? std::pow(relative / last_full, 1.0 / since_full) : kUnknownRate;
    }
    expected = relative * rate;
    const bool falls = plain ? rate <= kSlowestRate : rate < 1;  // false for NaN
    // A step taken back, after which the history is empty, is a large change.
    const bool in_turn = plain || (since_full < kLongestLowPrecision && count > 0);
    next = falls && in_turn && expected > goal ? low(plain) : Products::kFull;
  }
};

}  // namespace fastdeq
