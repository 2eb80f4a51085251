// The scalars of one sample during a solve on the GPU, and what its evaluations decide: plain and
// damped steps, heavy ball and Anderson acceleration, with an optional bfloat16 ramp. The same
// decisions as fastdeq/driver.py and, for the ramp, csrc/cpu/worker.h; host and device code.
//
//   Sample<T> s = fresh_sample<T>(options);
//   for each evaluation k = 0, 1, ..., of a point that lies where the last decision said:
//     Decision d = judge<kRamp>(s, options, |value - point|, |value|, whether it was exact);
//     1. d.improved: the point is the best iterate.
//     2. d.step is kMix: value and g = value - point go into slot k mod (window + 1) of the
//        history, the products <g_k, g_j> of the d.count evaluations before and of g_k itself into
//        the Gram matrix; mixed(s, solve_small(... d.count ...)) takes in the outcome.
//     3. d.stop: the end, with d.status. Otherwise the next point is
//          kPlain      value, or point + damping (value - point)
//          kHeavyBall  point + change, change = omega (value - point) + (omega - 1) last change,
//                      where with omega = 1 the last change may be anything and does not enter
//          kMix        f_k - sum gamma_i (f_k - f_i) - (1 - damping) (g_k - sum gamma_i (g_k -
//          g_i)) kTrusted    the value of the evaluation before: slot k - 1 of the history kBest
//          the best iterate, in full precision: a narrow evaluation has overflowed
//        and the next evaluation is narrow where d.narrow says so.
//
// T is the dtype of the vectors. Norms are double. A slot belongs to an evaluation, the same one
// for all samples; d.count says how many slots before it hold this sample's history.

#pragma once

#include <cmath>
#include <cstdint>

#include "anderson.h"
#include "cpu/solve_task.h"

namespace fastdeq {
namespace cuda {

// As in fastdeq/driver.py, fastdeq/solvers/heavy_ball.py and csrc/cpu/ramp.h.
constexpr double kResidualEps = 1e-9;
constexpr double kLargestRadius = 0.98;
constexpr double kDropPlain = 400, kDropAccelerated = 30;
constexpr int kLongestNarrow = 25;

struct SolveOptions {
  double tol = 0;
  int32_t max_iter = 1;  // updates; exactly so many where `fixed`
  bool fixed = false;
  int32_t patience = 50;
  double damping = 1;
  bool momentum = false;  // heavy ball, from the estimate `radius` of the spectral radius
  double radius = 0.5;
  int32_t window = 0;  // differences kept by Anderson acceleration; 0: none
  double safeguard = 0, accelerate_above = 0;
  AndersonOptions anderson{};
  bool ramp = false;  // bfloat16 products where they do no harm
};

template <typename T>
struct Sample {
  double norm, previous_norm;  // |value - point|, now and one evaluation before
  double trusted_norm;         // Anderson: of the last evaluation that was not taken back
  T best_residual;
  int32_t iterations, idle;  // updates; verified iterates in a row that brought no new best
  int32_t count;             // evaluations in the history
  bool plain, accelerated;   // no acceleration yet; the point came from a mixing step
  int32_t rejects[kMostCounters];

  double radius, omega, led;  // heavy ball: estimate, omega of the next step, of the last one
  double norms[2];            // residual norms two and three evaluations before

  bool narrow_allowed;
  double anchor, goal;   // relative residual at the last exact evaluation; where one is due
  int32_t since_anchor;  // evaluations
};

enum class StepKind : int8_t { kPlain, kHeavyBall, kMix, kTrusted, kBest };

struct Decision {
  StepKind step = StepKind::kPlain;
  bool improved = false;
  bool stop = false;
  Status status = Status::kMaxIter;
  bool narrow = false;
  int32_t count = 0;
  double omega = 1;
};

template <typename T>
FASTDEQ_HOST_DEVICE Sample<T> fresh_sample(const SolveOptions& o) {
  const double infinite = HUGE_VAL;
  Sample<T> s{};
  s.norm = s.previous_norm = s.trusted_norm = infinite;
  s.best_residual = T(infinite);
  s.plain = o.window == 0 || o.accelerate_above > 0;
  s.radius = o.radius;
  s.omega = s.led = 1;
  s.norms[0] = s.norms[1] = infinite;
  s.narrow_allowed = o.ramp;
  s.anchor = s.goal = infinite;
  return s;
}

// The status of a sample that is stopped from outside.
template <typename T>
FASTDEQ_HOST_DEVICE Status status_at_the_limit(const Sample<T>& s, const SolveOptions& o) {
  return double(s.best_residual) <= o.tol ? Status::kConverged : Status::kMaxIter;
}

template <typename T>
FASTDEQ_HOST_DEVICE bool is_slow(const Sample<T>& s, const SolveOptions& o) {
  return o.window > 0 && !(s.norm <= o.accelerate_above * s.previous_norm);  // true for NaN
}

// The next heavy-ball step's omega from the norms; `trusted` where this one and the one before are
// of exact evaluations. See fastdeq/solvers/heavy_ball.py.
template <typename T>
FASTDEQ_HOST_DEVICE void learn(Sample<T>& s, bool trusted) {
  const double one = s.norm / s.previous_norm, three = std::cbrt(s.norm / s.norms[1]);
  const double left = one < three ? one : three, before = s.led - 1;
  s.norms[1] = s.norms[0];
  s.norms[0] = s.previous_norm;
  if (trusted && s.iterations > 3 && left > std::sqrt(before)) {  // false for NaN
    const double seen = (left * left + before) / (s.led * left);
    const double radius = seen < kLargestRadius ? seen : kLargestRadius;
    s.radius = radius > s.radius ? radius : s.radius;
  }
  s.led = s.omega;
  s.omega = 2 / (1 + std::sqrt(1 - s.radius * s.radius));
}

// After an exact evaluation: where the next one is due, equal drops on the way to the tolerance.
template <typename T>
FASTDEQ_HOST_DEVICE void set_anchor(Sample<T>& s, const SolveOptions& o, double relative) {
  if (s.since_anchor > 0 && std::isfinite(s.goal) && !(relative <= 0.5 * s.anchor)) {
    s.narrow_allowed = false;
  }
  s.anchor = relative;
  s.since_anchor = 0;
  const double largest = s.plain ? kDropPlain : kDropAccelerated, target = 0.97 * o.tol;
  double drop = largest;
  if (target > 0 && relative > target) {
    const double total = std::log(relative / target);
    drop = std::exp(total / std::ceil(total / std::log(largest)));
  }
  s.goal = relative / drop;
}

// Whether the next evaluation may be narrow; `relative` belongs to the one just made.
template <typename T>
FASTDEQ_HOST_DEVICE bool is_next_narrow(const Sample<T>& s, const SolveOptions& o,
                                        double relative) {
  double rate = 0.9;  // unknown
  if (s.plain) {
    if (std::isfinite(s.previous_norm)) rate = s.norm / s.previous_norm;
  } else if (s.since_anchor > 0) {
    rate = std::pow(relative / s.anchor, 1.0 / s.since_anchor);
  }
  if (!s.narrow_allowed || s.iterations + 1 >= o.max_iter) return false;
  if (s.plain ? !(rate <= 0.98) : !(rate < 1)) return false;  // not getting on, or NaN
  if (!s.plain && (s.since_anchor >= kLongestNarrow || s.count == 0)) return false;
  return relative * rate > s.goal;
}

// Anderson's step: taken back, mixed, or impossible (false).
template <typename T>
FASTDEQ_HOST_DEVICE bool accelerate(Sample<T>& s, const SolveOptions& o, Decision& d) {
  // NaN compares false: "not (norm <= limit)" takes a step back that is not finite as well.
  if (s.accelerated && !(s.norm <= o.safeguard * s.trusted_norm)) {
    d.step = StepKind::kTrusted;
    ++s.rejects[0];
    s.accelerated = false;
    s.count = 0;
    return true;
  }
  if (!std::isfinite(s.norm)) return false;
  d.step = StepKind::kMix;
  d.count = s.count;
  s.trusted_norm = s.norm;
  s.accelerated = s.count > 0;  // unless `mixed` hears that the weights were rejected
  s.count = s.count < o.window ? s.count + 1 : o.window;
  return true;
}

// Takes in the outcome of the small solve of a kMix step, whether or not the sample stops.
template <typename T>
FASTDEQ_HOST_DEVICE void mixed(Sample<T>& s, const AndersonOutcome& outcome) {
  s.rejects[1] += outcome.rejected;
  s.rejects[2] += outcome.dropped > 0;
  s.accelerated = s.accelerated && !outcome.rejected;
}

template <bool kRamp, typename T>
FASTDEQ_HOST_DEVICE Decision judge(Sample<T>& s, const SolveOptions& o, double norm, double size,
                                   bool exact) {
  Decision d;
  d.omega = s.omega;
  if (o.momentum) d.step = StepKind::kHeavyBall;
  s.previous_norm = s.norm;
  s.norm = norm;
  // Next to infinity every residual would be small.
  const T relative = std::isfinite(size) ? T(norm / (size + kResidualEps)) : T(NAN);
  const bool finite = std::isfinite(norm);

  if (!kRamp || exact) {
    d.improved = relative < s.best_residual;  // false for NaN
    if (d.improved) s.best_residual = relative;
    s.idle = d.improved ? 0 : s.idle + 1;
    d.status = status_at_the_limit(s, o);
    const bool met = d.status == Status::kConverged;
    d.stop = s.iterations == o.max_iter || (met && !o.fixed);
    if (d.stop) return d;

    const bool after_exact = s.since_anchor == 0;
    if (s.plain && after_exact && is_slow(s, o)) s.plain = false;
    if (kRamp && o.ramp) set_anchor(s, o, double(relative));
    if (o.momentum) learn(s, after_exact);
    if (s.plain ? !finite : !accelerate(s, o, d)) {
      d.stop = true;  // without a stop test it may have converged before
      if (!met) d.status = Status::kNonfinite;
      return d;
    }
    if (s.iterations >= o.patience && s.idle >= o.patience && !o.fixed) {
      d.stop = true;
      d.status = Status::kStagnated;
      return d;
    }
  } else {
    ++s.since_anchor;
    // Nearer to the goal its rounding hides how fast the residual falls.
    const bool trusted = double(relative) > 1.5 * s.goal;
    if (!finite && !s.accelerated) {
      // Perhaps its rounding is to blame.
      d.step = StepKind::kBest;
      s.narrow_allowed = false;
      s.count = 0;
      s.omega = 1;
    } else if (o.momentum) {
      learn(s, trusted);
    } else if (!s.plain) {
      accelerate(s, o, d);
    } else if (trusted && is_slow(s, o)) {
      s.plain = false;
      s.goal = HUGE_VAL;  // an anchor before the first step with a history
    }
  }
  if (kRamp && o.ramp) d.narrow = is_next_narrow(s, o, double(relative));
  ++s.iterations;
  return d;
}

}  // namespace cuda
}  // namespace fastdeq
