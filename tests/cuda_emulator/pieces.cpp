// The parts of csrc/cuda that need no machine: the state machine of a sample and the activations.

#include <cuda_runtime.h>

#include "cuda/activations.cuh"
#include "cuda/sample.cuh"

namespace {

using namespace fastdeq;
using namespace fastdeq::cuda;

struct Options {
  int32_t max_iter, fixed, patience, momentum, window, ramp;
  double tol, damping, radius, safeguard, accelerate_above;
};

struct Record {
  int32_t step, improved, stop, status, narrow, count, iterations, idle;
  int32_t rejects[3];
  double omega, best_residual;
};

SolveOptions read(const Options& given) {
  SolveOptions o;
  o.max_iter = given.max_iter;
  o.fixed = given.fixed != 0;
  o.patience = given.patience;
  o.momentum = given.momentum != 0;
  o.window = given.window;
  o.ramp = given.ramp != 0;
  o.tol = given.tol;
  o.damping = given.damping;
  o.radius = given.radius;
  o.safeguard = given.safeguard;
  o.accelerate_above = given.accelerate_above;
  return o;
}

}  // namespace

extern "C" {

// Judges one evaluation after another, all of one sample, until it stops; how many were judged.
// Evaluation i has norm[i] and size[i], was exact[i], and its mixing, if any, dropped and rejected.
int judge_evaluations(const Options* options, int count, const double* norm, const double* size,
                      const int8_t* exact, const int8_t* dropped, const int8_t* rejected,
                      Record* records) {
  const SolveOptions o = read(*options);
  Sample<double> s = fresh_sample<double>(o);
  for (int i = 0; i < count; ++i) {
    const Decision d = o.ramp ? judge<true>(s, o, norm[i], size[i], exact[i] != 0)
                              : judge<false>(s, o, norm[i], size[i], true);
    if (d.step == StepKind::kMix) mixed(s, {dropped[i], rejected[i] != 0});
    records[i] = {int(d.step),   d.improved,     d.stop,
                  int(d.status), d.narrow,       d.count,
                  s.iterations,  s.idle,         {s.rejects[0], s.rejects[1], s.rejects[2]},
                  d.omega,       s.best_residual};
    if (d.stop) return i + 1;
  }
  return count;
}

// As the narrow evaluations of a contraction come: evaluation i has relative residual
// first * rate^i; whether it was exact is written to `exact`. How many until it stopped.
int judge_contraction(const Options* options, double first, double rate, int most, int8_t* exact,
                      int32_t* status) {
  const SolveOptions o = read(*options);
  Sample<double> s = fresh_sample<double>(o);
  bool narrow = false;
  double norm = first;
  for (int i = 0; i < most; ++i, norm *= rate) {
    exact[i] = !narrow;
    const Decision d = judge<true>(s, o, norm, 1, !narrow);
    if (d.step == StepKind::kMix) mixed(s, {0, false});
    *status = int(d.status);
    if (d.stop) return i + 1;
    narrow = d.narrow;
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
