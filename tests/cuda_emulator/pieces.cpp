// What needs no machine: the state machine of a sample and the activations of csrc/cuda.

#include <cuda_runtime.h>

#include "common/sample.h"
#include "cuda/activations.cuh"

namespace {

using namespace fastdeq;
using namespace fastdeq::cuda;

struct Record {
  int32_t step, improved, stop, status, next, count, iterations, idle;
  int32_t rejects[3];
  double omega, best_residual;
};

Decision judge_one(Sample& s, const SolveOptions& o, double norm, double size, bool low,
                   PrecisionSchedule* schedule) {
  const double relative = relative_residual(o, norm, size);
  const Decision d =
      low ? judge_low(s, o, norm, relative, *schedule) : judge(s, o, norm, relative, schedule);
  if (schedule != nullptr) choose_products(s, o, relative, *schedule);
  return d;
}

}  // namespace

extern "C" {

int options_bytes() { return int(sizeof(SolveOptions)); }

// The fields, in the order of fastdeq/solvers/solve_options.py.
void echo_options(const SolveOptions* options, double* fields) {
  const SolveOptions& o = *options;
  for (const double field :
       {double(o.solver), o.tol, double(o.max_iter), double(o.patience), o.atol,
        double(o.precision), o.damping, double(o.fixed_iterations), double(o.momentum), o.radius,
        double(o.most_directions), double(o.window), double(o.first_window), o.regularization,
        o.rank_tolerance, o.max_weight, o.safeguard, o.accelerate_above,
        double(o.min_iter)}) {
    *fields++ = field;
  }
}

// Judges one evaluation after another, all of one sample, until it stops; how many were judged.
// Evaluation i has norm[i] and size[i], was a `low` precision one, and its mixing, if any, dropped
// and rejected. `lowest`: of Products; in full precision there is no schedule.
int judge_evaluations(const SolveOptions* options, int lowest, int count, const double* norm,
                      const double* size, const int8_t* low, const int8_t* dropped,
                      const int8_t* rejected, Record* records) {
  const SolveOptions& o = *options;
  Sample s;
  reset(s, o);
  PrecisionSchedule schedule;
  schedule.lowest = Products(lowest);
  PrecisionSchedule* const used = lowest > 0 ? &schedule : nullptr;
  for (int i = 0; i < count; ++i) {
    const Decision d = judge_one(s, o, norm[i], size[i], low[i] != 0, used);
    if (d.step == Step::kMix) take_in(s, {dropped[i], rejected[i] != 0});
    records[i] = {int(d.step),  d.improved, d.stop, int(d.status), int(schedule.next), d.count,
                  s.iterations, s.idle,     {},     d.omega,       s.best_residual};
    for (int j = 0; j < 3; ++j) records[i].rejects[j] = s.rejects[j];
    if (d.stop) return i + 1;
  }
  return count;
}

// As the evaluations of a contraction come: evaluation i has relative residual first * rate^i; the
// products that it was evaluated with are written to `products`. How many until it stopped.
int judge_contraction(const SolveOptions* options, int lowest, double first, double rate, int most,
                      int8_t* products, int32_t* status) {
  Sample s;
  reset(s, *options);
  PrecisionSchedule schedule;
  schedule.lowest = Products(lowest);
  double norm = first;
  for (int i = 0; i < most; ++i, norm *= rate) {
    products[i] = int8_t(schedule.next);
    const bool low = schedule.next != Products::kFull;
    const Decision d = judge_one(s, *options, norm, 1, low, &schedule);
    if (d.step == Step::kMix) take_in(s, {0, false});
    *status = int(d.status);
    if (d.stop) return i + 1;
  }
  return most;
}

void activation_double(int index, int slope, const double* in, double* out, int count) {
  for (int i = 0; i < count; ++i) {
    out[i] = slope ? activation_slope(index, in[i]) : activate(index, in[i]);
  }
}

void activation_float(int index, int slope, const float* in, float* out, int count) {
  for (int i = 0; i < count; ++i) {
    out[i] = slope ? activation_slope(index, in[i]) : activate(index, in[i]);
  }
}
}
