// The iterations of a general map, z = f(z), between its evaluations: one call takes f's value,
// judges each sample and writes the next point. Specification: fastdeq/solvers/loop.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "common/solve_options.h"

namespace fastdeq {

// What remains when the iteration has ended, per sample.
struct IterationResult {
  at::Tensor value;       // (B, n): the best iterates
  at::Tensor status;      // (B,) int8
  at::Tensor iterations;  // (B,) int32
  at::Tensor residual;    // (B,) of the value's dtype
  at::Tensor rejects;     // (B, counters) int32
  at::Tensor rate;  // (B,): the last residual norm over the one before, NaN where there is none
  // (B,): the least residual norm of some iterates around the middle of all updates that are
  // allowed, and of the last ones; infinite where there were none.
  at::Tensor middle, end;
};

class Iteration {
 public:
  // `start` is (B, n) float or double on the CPU; `parts` are the sizes of the parts of a
  // row, one or more, each of which is to meet the tolerance.
  // Where there is an `offset` (B, n), f is the map that is evaluated plus `scale` (B,) times it.
  static std::unique_ptr<Iteration> make(const at::Tensor& start, const SolveOptions& options,
                                         const std::vector<int64_t>& parts,
                                         const at::Tensor& offset, const at::Tensor& scale);
  virtual ~Iteration() = default;

  // (B, n): where to evaluate f. Its memory may be written to by the next `advance`, unless
  // somebody still holds the tensor or a view of it then.
  virtual at::Tensor point() const = 0;
  // Takes the value of the map at the point, (B, n), zeros where it is undefined, and returns how
  // many samples go on. The values of others are not read from then on.
  virtual int64_t advance(const at::Tensor& value) = 0;
  // Which samples go on, int64.
  virtual at::Tensor running() const = 0;
  virtual IterationResult result() const = 0;
};

}  // namespace fastdeq
