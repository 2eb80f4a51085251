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
  // row, one or more, each of which is to meet the tolerance; `apart`: each has memory of its own.
  // Where there is an `offset`, which needs parts in one row, (B, n), f is the map that is
  // evaluated plus `scale` (B,) times it.
  static std::unique_ptr<Iteration> make(const at::Tensor& start, const SolveOptions& options,
                                         const std::vector<int64_t>& parts, bool apart,
                                         const at::Tensor& offset, const at::Tensor& scale);
  virtual ~Iteration() = default;

  // (B, n): where to evaluate f; a tensor of its own on memory that the next `advance` may write
  // to, unless somebody still holds the tensor or a view of it then. A copy where parts lie apart.
  virtual at::Tensor point() const = 0;
  // The same as its parts, (B, n_p) each: never copies.
  virtual std::vector<at::Tensor> points() const = 0;
  // Takes the value of the map at the point, (B, n) or each part (B, n_p), zeros where there is
  // nothing, and returns how many samples go on. The values of others are not read from then on.
  virtual int64_t advance(const std::vector<at::Tensor>& value) = 0;
  // Which samples go on, int64.
  virtual at::Tensor running() const = 0;
  virtual IterationResult result() const = 0;
};

}  // namespace fastdeq
