// The judgement of an iteration of a general map: from the sums of a sample's entries to its
// decision (common/sample.h) and the weights of Anderson acceleration. No vector is touched here.

#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "common/sample.h"
#include "cpu/iteration_task.h"

namespace fastdeq {

// The least residual norm of some iterates around the middle of all updates that are allowed, and
// of the last ones: accelerated norms rise in between.
struct Trend {
  std::array<double, 8> latest;
  double middle = HUGE_VAL;

  Trend() { latest.fill(HUGE_VAL); }
  double end() const { return *std::min_element(latest.begin(), latest.end()); }
  void add(int64_t evaluation, double norm, int64_t middle_at) {
    latest[size_t(evaluation) % latest.size()] = norm;
    if (evaluation == middle_at) middle = end();
  }
};

struct IteratedSample : Sample {
  int64_t entered = 0;  // evaluations in the history so far, overwritten ones included
  bool ended = false;
  Status status = Status::kMaxIter;
  Trend trend;
  Decision decision;  // of this evaluation

  bool enters() const { return decision.step == Step::kMix || decision.step == Step::kRefill; }
};

// T is the dtype of the vectors.
template <typename T>
class Judge {
 public:
  // `parts` are the sizes of the parts of a row, each of which is to meet the tolerance.
  Judge(const SolveOptions& given, int64_t batch, size_t parts)
      : options(given),
        entries(given.window + 1),
        places(kFirstProduct + given.window),
        samples(size_t(batch)),
        parts_(parts),
        sums_(size_t(batch * places) * parts),
        gram_(given.window > 0 ? size_t(batch * entries * entries) : 0),
        gamma_(size_t(batch * given.window)) {
    using Limits = std::numeric_limits<T>;
    options.floor = kRoundingFloor * double(Limits::epsilon());
    options.largest_size = std::pow(double(Limits::max()), kSizeExponent);
    for (IteratedSample& s : samples) reset(s, options);
  }

  // Of sample b, all parts: `places` each.
  double* sums_of(int64_t b) { return sums_.data() + b * places * int64_t(parts_); }
  void clear_sums(int64_t b) { std::fill_n(sums_of(b), places * int64_t(parts_), 0.0); }

  const double* gamma_of(int64_t b) const { return gamma_.data() + b * options.window; }

  // Entries of the history that the next evaluation is multiplied with.
  int64_t ages(const IteratedSample& s) const { return s.plain ? 0 : s.count; }

  // From the sums of the sample's evaluation number `evaluation`.
  // `work` is for small_solve_doubles of the window.
  void decide(int64_t b, int64_t evaluation, double* work) {
    IteratedSample& s = samples[size_t(b)];
    const double* const sums = sums_of(b);
    const Residual r = residual_of(sums);
    s.decision = judge(s, options, r.norm, r.relative, r.limit);
    s.ended = s.decision.stop;
    s.status = s.decision.status;
    if (options.window == 0) return;
    if (!s.ended) s.trend.add(evaluation, r.norm, options.updates() / 2);
    if (s.enters()) extend_gram(b, sums);
    if (s.decision.step != Step::kMix) return;
    const Gram gram{gram_of(b), entries, 1, int(entries), int(newest(s)), int(s.decision.count)};
    double* const gamma = gamma_.data() + b * options.window;
    take_in(s, solve_small(OneLane(), gram, options, work, gamma));
  }

  // Which samples have not ended.
  std::vector<int64_t> running() const {
    std::vector<int64_t> found;
    for (size_t b = 0; b < samples.size(); ++b) {
      if (!samples[b].ended) found.push_back(int64_t(b));
    }
    return found;
  }

  SolveOptions options;
  const int64_t entries, places;  // of the Gram matrix, a ring; sums of a part
  std::vector<IteratedSample> samples;

 private:
  // |f(z) - z|, relative to |f(z)|, and the latter that the tolerance allows: of the part that is
  // furthest from it.
  struct Residual {
    double norm, relative, limit;
  };

  Residual residual_of(const double* sums) const {
    double norm_square = 0, size_square = 0, worst = -HUGE_VAL;
    Residual r{0, NAN, options.tol};
    for (size_t p = 0; p < parts_; ++p, sums += places) {
      norm_square += sums[kResidualSquare];
      size_square += sums[kSizeSquare];
      const double size = T(std::sqrt(sums[kSizeSquare])) + kResidualEps;
      const double relative = T(std::sqrt(sums[kResidualSquare])) / size;
      const double limit = options.tol + options.atol / size;
      if (relative - limit <= worst) continue;
      worst = std::isnan(relative) ? HUGE_VAL : relative - limit;
      r.relative = T(relative);
      r.limit = limit;
    }
    r.norm = T(std::sqrt(norm_square));
    // Next to infinity every residual would be small.
    if (!(std::sqrt(size_square) < options.largest_size)) r.relative = NAN;
    return r;
  }

  int64_t newest(const IteratedSample& s) const { return s.entered % entries; }
  double* gram_of(int64_t b) { return gram_.data() + b * entries * entries; }

  void extend_gram(int64_t b, const double* sums) {
    const IteratedSample& s = samples[size_t(b)];
    double* const gram = gram_of(b);
    for (int64_t age = 0; age <= s.decision.count; ++age) {
      const int64_t place = age == 0 ? int64_t(kResidualSquare) : kFirstProduct + age - 1;
      double inner = 0;
      for (size_t p = 0; p < parts_; ++p) inner += sums[int64_t(p) * places + place];
      const int64_t own = newest(s), other = entry_of(own, age, entries);
      gram[own * entries + other] = gram[other * entries + own] = inner;
    }
  }

  const size_t parts_;
  std::vector<double> sums_, gram_, gamma_;
};

}  // namespace fastdeq
