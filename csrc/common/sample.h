// The scalars of one sample during a solve, and what its evaluations decide: plain and damped
// steps, heavy ball and Anderson acceleration, on the CPU and the GPU. No vector is touched here.
// Specification: fastdeq/solvers/loop.py and the solvers beside it.
//
//   reset(s, options);
//   for each evaluation k = 0, 1, ..., of a point that lies where the last decision said:
//     Decision d = judge(s, options, |value - point|, relative residual);
//     1. d.improved: the point is the best iterate.
//     2. d.step is kMix or kRefill: value and g = value - point enter the history, the products
//        <g_k, g_j> of the d.count evaluations before and of g_k itself the Gram matrix; with kMix
//        take_in(s, solve_small(... d.count ...)) hears of the outcome.
//     3. d.stop: the end, with d.status. Otherwise go on as d.step says.
//
// With low-precision products (precision_schedule.h) judge takes the evaluations in full precision,
// judge_low the others, both with a PrecisionSchedule, and choose_products those of the next one.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/anderson.h"
#include "common/precision_schedule.h"

namespace fastdeq {

// How the next point is found; `f` and `g` are the history's.
enum class Step : int8_t {
  kPlain,      // value, or point + damping (value - point)
  kHeavyBall,  // point + change, change = omega (value - point) + (omega - 1) last change; where
               // omega is 1, the last change may be anything and does not enter
  kMix,        // f_k - sum gamma_i (f_k - f_i) - (1 - damping) (g_k - sum gamma_i (g_k - g_i))
  kRefill,     // as kPlain, but the evaluation enters the history
  kTakeBack,   // the value of the evaluation before this one, f_(k-1)
  kBest,       // the best iterate, in full precision: a low-precision evaluation has overflowed
  kSwitch,     // heavy-ball steps get nowhere: the solver's own ones follow, from the best iterate
};

struct Decision {
  Step step = Step::kPlain;
  bool improved = false;
  bool stop = false;
  Status status = Status::kMaxIter;
  int32_t count = 0;
  double omega = 1;
};

struct Sample {
  double norm, previous_norm;        // |value - point|, now and one evaluation before
  double best_residual, least_norm;  // of the best iterate, relative; the least of those so far
  double half_now, half_before;      // least norms of this half of the patience and of the last
  int32_t iterations, idle;          // updates; verified iterates in a row that were not the best
  bool converged;                    // the best iterate meets the tolerance

  int32_t count;            // Anderson: evaluations in the history
  bool plain, accelerated;  // no acceleration yet; the point came from a mixing step
  bool refills;             // after a step taken back: plain steps until the history is full
  double trusted_norm;      // of the last evaluation that was not taken back
  int32_t rejects[kMostCounters];

  // Heavy ball: estimate of the spectral radius, omega of the next step and of the last one.
  double radius, omega, previous_omega;
  double norms[2];             // residual norms two and three evaluations before
  double norm_to_halve;        // within kHalveWithin evaluations
  int32_t steps_since_halved;  // evaluations
};

// Before the first evaluation.
FASTDEQ_HOST_DEVICE inline void reset(Sample& s, const SolveOptions& o) {
  s.norm = s.previous_norm = s.trusted_norm = s.best_residual = s.least_norm = HUGE_VAL;
  s.half_now = s.half_before = HUGE_VAL;
  s.iterations = s.idle = s.count = 0;
  s.plain = o.window == 0 || o.accelerate_above > 0;
  s.accelerated = s.refills = s.converged = false;
  for (int i = 0; i < kMostCounters; ++i) s.rejects[i] = 0;
  s.radius = o.radius;
  s.omega = s.previous_omega = 1;
  s.norms[0] = s.norms[1] = s.norm_to_halve = HUGE_VAL;
  s.steps_since_halved = 0;
}

// From |value - point| and |value|, to be rounded to the dtype of the vectors.
FASTDEQ_HOST_DEVICE inline double relative_residual(const SolveOptions& o, double norm,
                                                    double size) {
  // Next to infinity every residual would be small.
  return size < o.largest_size ? norm / (size + kResidualEps) : double(NAN);
}

// The relative residual |r| / (|f| + eps) that |r| <= atol + tol (|f| + eps) allows, where |r| is
// the norm and r/|f| the relative residual.
FASTDEQ_HOST_DEVICE inline double tolerance_at(const SolveOptions& o, double norm,
                                               double relative) {
  return o.atol > 0 && norm > 0 ? o.tol + o.atol * relative / norm : o.tol;
}

FASTDEQ_HOST_DEVICE inline Status status_at_the_limit(const Sample& s) {
  return s.converged ? Status::kConverged : Status::kMaxIter;
}

// Where the iteration cannot go on; without a stop test the sample may have converged before.
FASTDEQ_HOST_DEVICE inline Status status_of_failure(const Sample& s) {
  return s.converged ? Status::kConverged : Status::kNonfinite;
}

// Asked once after each full-precision evaluation of an iterate that does not end the solve:
// whether the sample is to be given up. See fastdeq/solvers/loop.py.
FASTDEQ_HOST_DEVICE inline bool is_out_of_patience(Sample& s, const SolveOptions& o) {
  if (o.fixed() || s.iterations < o.min_iter) return false;
  if (s.iterations >= kPatience && s.idle >= kPatience && s.best_residual < o.floor) return true;
  const int32_t half = o.patience > 3 ? o.patience / 2 : 1;
  if (s.iterations < half || s.idle % half != 0) return false;
  const bool falls = s.half_now < kStillFalling * s.half_before;
  s.half_before = s.half_now;
  s.half_now = HUGE_VAL;
  return s.idle >= o.patience && !falls;
}

FASTDEQ_HOST_DEVICE inline bool is_slow(const Sample& s, const SolveOptions& o) {
  return o.window > 0 && !(s.norm <= o.accelerate_above * s.previous_norm);  // true for NaN
}

// The next heavy-ball step's omega from the norms; `shows_rate`: this norm and the one before are
// exact enough for that. True when the residual does not halve in time. See
// fastdeq/solvers/heavy_ball.py.
FASTDEQ_HOST_DEVICE inline bool learn(Sample& s, bool shows_rate) {
  const double one = s.norm / s.previous_norm, three = std::cbrt(s.norm / s.norms[1]);
  const double left = one < three ? one : three, before = s.previous_omega - 1;
  s.norms[1] = s.norms[0];
  s.norms[0] = s.previous_norm;
  if (shows_rate && s.iterations > kLearnAfter && left > std::sqrt(before)) {  // false for NaN
    const double seen = (left * left + before) / (s.previous_omega * left);
    const double radius = seen < kLargestRadius ? seen : kLargestRadius;
    s.radius = radius > s.radius ? radius : s.radius;
  }
  s.previous_omega = s.omega;
  s.omega = 2 / (1 + std::sqrt(1 - s.radius * s.radius));
  const bool halved = s.norm <= 0.5 * s.norm_to_halve;
  if (halved) s.norm_to_halve = s.norm;
  s.steps_since_halved = halved ? 0 : s.steps_since_halved + 1;
  return s.steps_since_halved >= kHalveWithin;
}

// Differences that the next evaluation may use.
FASTDEQ_HOST_DEVICE inline int32_t most_differences(const Sample& s, const SolveOptions& o) {
  if (o.first_window == 0) return o.window;
  const int32_t beyond = s.iterations > kGrowAfter ? (s.iterations - kGrowAfter) / kGrowEvery : 0;
  const int32_t most = o.first_window + beyond;
  return most < o.window ? most : o.window;
}

// Anderson's step: taken back, mixed, or impossible (false).
FASTDEQ_HOST_DEVICE inline bool accelerate(Sample& s, const SolveOptions& o, Decision& d) {
  // NaN compares false: "not (norm <= limit)" takes a step back that is not finite as well.
  if (s.accelerated && !(s.norm <= o.safeguard * s.trusted_norm)) {
    d.step = Step::kTakeBack;
    ++s.rejects[0];
    s.accelerated = false;
    s.refills = true;
    s.count = 0;
    return true;
  }
  if (!std::isfinite(s.norm)) return false;
  d.step = s.refills ? Step::kRefill : Step::kMix;
  d.count = s.count;
  s.trusted_norm = s.norm;
  // Unless `take_in` hears that the weights were rejected.
  s.accelerated = !s.refills && s.count > 0;
  const int32_t most = most_differences(s, o);
  s.count = s.count < most ? s.count + 1 : most;
  s.refills = s.refills && s.count < most;
  return true;
}

// The outcome of the small solve of a kMix step, whether or not the sample stops.
FASTDEQ_HOST_DEVICE inline void take_in(Sample& s, const AndersonOutcome& outcome) {
  s.rejects[1] += outcome.rejected;
  s.rejects[2] += outcome.dropped > 0;
  s.accelerated = s.accelerated && !outcome.rejected;
}

// The part of a judgement that holds for every solver: residual, best iterate, stop test.
FASTDEQ_HOST_DEVICE inline Decision verify(Sample& s, const SolveOptions& o, double norm,
                                           double relative, double limit) {
  Decision d;
  s.previous_norm = s.norm;
  s.norm = norm;
  // Comparisons with NaN are false.
  const bool meets = relative <= limit;
  const bool lower = norm < s.least_norm && std::isfinite(relative);
  d.improved = s.converged ? meets && (relative < s.best_residual || lower)
                           : meets || relative < s.best_residual || lower;
  if (d.improved) {
    s.best_residual = relative;
    s.least_norm = norm < s.least_norm ? norm : s.least_norm;
    s.converged = meets;
  }
  s.idle = d.improved ? 0 : s.idle + 1;
  if (norm < s.half_now) s.half_now = norm;
  d.status = status_at_the_limit(s);
  d.stop = s.iterations == o.updates() || (s.converged && !o.fixed() && s.iterations >= o.min_iter);
  return d;
}

FASTDEQ_HOST_DEVICE inline Decision verify(Sample& s, const SolveOptions& o, double norm,
                                           double relative) {
  return verify(s, o, norm, relative, tolerance_at(o, norm, relative));
}

FASTDEQ_HOST_DEVICE inline void stop(Decision& d, Status status) {
  d.stop = true;
  d.status = status;
}

// After an evaluation in full precision; the schedule is null where all of them are. `limit` is the
// relative residual at which the sample has converged.
FASTDEQ_HOST_DEVICE inline Decision judge(Sample& s, const SolveOptions& o, double norm,
                                          double relative, double limit,
                                          PrecisionSchedule* schedule = nullptr) {
  Decision d = verify(s, o, norm, relative, limit);
  if (d.stop) return d;
  const bool finite = std::isfinite(norm);
  const bool after_full = schedule == nullptr || schedule->since_full == 0;
  if (s.plain && after_full && is_slow(s, o)) s.plain = false;
  if (schedule != nullptr) schedule->set_goal(limit, s.plain, relative);
  if (o.begins_with_momentum()) {
    d.step = Step::kHeavyBall;
    d.omega = s.omega;
    const bool late = learn(s, after_full);
    if ((late || !finite) && o.solver != Solver::kHeavyBall && std::isfinite(s.best_residual)) {
      d.step = Step::kSwitch;
    }
  }
  const bool possible = d.step == Step::kSwitch || (s.plain ? finite : accelerate(s, o, d));
  if (!possible) {
    stop(d, status_of_failure(s));
  } else if (is_out_of_patience(s, o)) {
    stop(d, Status::kStagnated);
  } else {
    ++s.iterations;
  }
  return d;
}

FASTDEQ_HOST_DEVICE inline Decision judge(Sample& s, const SolveOptions& o, double norm,
                                          double relative, PrecisionSchedule* schedule = nullptr) {
  return judge(s, o, norm, relative, tolerance_at(o, norm, relative), schedule);
}

// After a low-precision evaluation: it neither stops a sample nor counts as an iterate.
FASTDEQ_HOST_DEVICE inline Decision judge_low(Sample& s, const SolveOptions& o, double norm,
                                              double relative, PrecisionSchedule& schedule) {
  Decision d;
  s.previous_norm = s.norm;
  s.norm = norm;
  ++schedule.since_full;
  const bool shows_rate = schedule.shows_rate(relative);
  if (!std::isfinite(norm) && !s.accelerated) {
    d.step = Step::kBest;  // perhaps rounding is to blame
    schedule.lowest = Products::kFull;
    s.count = 0;
    s.omega = 1;
  } else if (o.begins_with_momentum()) {
    d.step = Step::kHeavyBall;
    d.omega = s.omega;
    if (learn(s, shows_rate) && o.solver != Solver::kHeavyBall) d.step = Step::kSwitch;
  } else if (!s.plain) {
    accelerate(s, o, d);
  } else if (shows_rate && is_slow(s, o)) {
    s.plain = false;
    schedule.goal = HUGE_VAL;  // full precision before the first step with a history
  }
  ++s.iterations;
  return d;
}

// The products of the next evaluation. Apart from the judgement, so that the step's vectors do not
// wait for its power; `relative` is of the evaluation that was judged.
FASTDEQ_HOST_DEVICE inline void choose_products(const Sample& s, const SolveOptions& o,
                                                double relative, PrecisionSchedule& schedule) {
  const bool known = std::isfinite(s.previous_norm);
  const double rate = known ? s.norm / s.previous_norm : kUnknownRate;
  schedule.choose_next(s.plain, s.count, relative, rate);
  if (s.iterations >= o.updates()) schedule.next = Products::kFull;  // the last one verifies
}

}  // namespace fastdeq
