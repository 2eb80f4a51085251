// The entries of one sample in one iteration of a general map, as iteration.cpp gives them to the
// loops of an instruction set (iteration_rows.h). T is float or double; a row is contiguous.

#pragma once

#include <cstdint>

#include "common/sample.h"

namespace fastdeq {

// Places in an array of sums: |f(z) - z|^2, |f(z)|^2, and the products of f(z) - z with older ones.
enum SumPlace : int { kResidualSquare, kSizeSquare, kFirstProduct };

template <typename T>
struct RowEvaluation {
  // f(z) is the value, zeros where that is null, and scale times the offset, unless that is null.
  const T* value = nullptr;
  const T* offset = nullptr;
  T scale = 1;
  const T* point = nullptr;
  // Values f(z) and residuals f(z) - z of `ages` evaluations before, newest first.
  const T* const* old_f = nullptr;
  const T* const* old_g = nullptr;
  int64_t ages = 0;
};

template <typename T>
struct RowStep {
  Step step = Step::kPlain;
  T* best = nullptr;  // where the point is the best iterate
  T* next = nullptr;  // may be the point; null: no step
  T* last = nullptr;  // heavy ball: the last change of the point
  // Where the evaluation enters the history, which may be the place of the oldest; null: nowhere.
  T* f = nullptr;
  T* g = nullptr;
  T damping = 1;
  double omega = 1;
  const double* gamma = nullptr;  // weights of the evaluations before, for kMix
};

}  // namespace fastdeq
