// The options of a solve, its solvers and its results: what host and device code share.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/constants.h"

// On the CPU what is shared becomes part of its callers, so that each instruction set has its own.
#if defined(__CUDACC__)
#define FASTDEQ_HOST_DEVICE __host__ __device__
#else
#define FASTDEQ_HOST_DEVICE __attribute__((always_inline))
#endif

namespace fastdeq {

// As fastdeq.Status.
enum class Status : int8_t {
  kConverged = kStatusConverged,
  kMaxIter = kStatusMaxIter,
  kStagnated = kStatusStagnated,
  kNonfinite = kStatusNonfinite,
};

// The solvers of fastdeq/solvers; kPlain is Picard and Neumann.
enum class Solver : int8_t { kPlain, kAnderson, kHeavyBall, kEnergy, kMinres };

// "auto": low-precision products where they are known to win.
enum class Precision : int8_t { kAuto, kFloat32, kMixed };

// The fields of fastdeq/solvers/solve_options.py but `restart`: no engine here has GMRES. One that
// the solver does not have means nothing.
struct SolveOptions {
  Solver solver = Solver::kPlain;
  double tol = 0;
  int32_t max_iter = 1;
  int32_t patience = kPatience;
  double atol = 0;
  Precision precision = Precision::kAuto;
  double damping = 1;
  int32_t fixed_iterations = 0;
  bool momentum = false;
  double radius = kFirstRadius;
  int32_t most_directions = 0;
  int32_t window = 0;
  int32_t first_window = 0;
  double regularization = 0;
  double rank_tolerance = 0;
  double max_weight = 0;
  double safeguard = 0;
  double accelerate_above = 0;
  int32_t min_iter = 0;

  // Of the dtype: the relative residual at which rounding may be all that is left, and the norm at
  // which a state counts as diverged.
  double floor = 0, largest_size = HUGE_VAL;

  FASTDEQ_HOST_DEVICE bool fixed() const { return fixed_iterations > 0; }
  // The most updates of a sample; exactly so many, without a stop test, where `fixed`.
  FASTDEQ_HOST_DEVICE int32_t updates() const { return fixed() ? fixed_iterations : max_iter; }
  // Whether a solve begins with heavy-ball steps.
  FASTDEQ_HOST_DEVICE bool begins_with_momentum() const {
    return momentum || solver == Solver::kHeavyBall;
  }
};

// Of steps that a solver took back, by reason: Anderson safeguard, weight_cap, rank_cut; energy
// energy, curvature; MINRES restart.
constexpr int kMostCounters = 3;
constexpr int counters_of(Solver solver) {
  return solver == Solver::kAnderson ? 3
         : solver == Solver::kEnergy ? 2
         : solver == Solver::kMinres ? 1
                                     : 0;
}

}  // namespace fastdeq
