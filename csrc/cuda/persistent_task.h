// What a persistent solve is given: the problem, its outputs, and where the plan put things.

#pragma once

#include <cstdint>

#include "common/sample.h"
#include "cuda/persistent_plan.h"

namespace fastdeq {
namespace cuda {

// Rows are (batch, size), contiguous. Entry (output j, input k) of W is weight[j * output_stride +
// k * input_stride].
template <typename T>
struct PersistentTask {
  int size;
  int64_t batch;
  const T* weight;
  int64_t output_stride, input_stride;
  const T* injection;  // c, or the adjoint's g
  const T* slope;      // the adjoint's D; null: forward
  const T* start;      // finite; null: zeros
  int activation;
  SolveOptions options;

  T* value;
  int8_t* status;
  int32_t* iterations;
  T* residual;
  int32_t* rejects;  // (batch, counters_of(options.solver))
  T* value_slope;    // null: not requested

  // See persistent_plan.h.
  int warps_m, warps_n, splits, chunk_shift;
  int members, groups, tiles;
  int row_units, weight_units, sums;
  int64_t area_bytes;

  unsigned char* barriers;  // a counter for each group, kCounterStride apart
  T* points;                // (groups, 2, tile rows, row)
  double* partial_sums;     // (groups, 2, members, sums, tile rows)
  T* last;                  // (blocks, tile rows, tile columns)
  T* history;               // (blocks, 2, window + 1, tile rows, tile columns)
  double* gram;             // (blocks, tile rows, window + 1, window + 1)
};

// A sample of the tile in shared memory.
struct TileSample {
  Sample sample;
  Decision decision;
  bool active;
  bool improved;  // the point just evaluated is the best, and not saved yet
  Status status;
};

template <typename T>
PersistentProblem persistent_problem(const PersistentTask<T>& task) {
  PersistentProblem q;
  q.size = task.size;
  q.batch = task.batch;
  q.element_bytes = int(sizeof(T));
  q.window = task.options.window;
  q.momentum = task.options.begins_with_momentum();
  q.sample_bytes = int(sizeof(TileSample));
  return q;
}

// Fills in what the plan decides; `scratch` holds plan.scratch_bytes.
template <typename T>
void apply_plan(PersistentTask<T>& task, const PersistentPlan& plan, unsigned char* scratch) {
  task.warps_m = plan.warps_m;
  task.warps_n = plan.warps_n;
  task.splits = plan.splits;
  task.chunk_shift = 0;
  while ((1 << task.chunk_shift) < plan.chunk) ++task.chunk_shift;
  task.members = plan.members;
  task.groups = plan.groups;
  task.tiles = plan.tiles;
  task.row_units = plan.row_units;
  task.weight_units = plan.weight_units;
  task.sums = plan.sums;
  task.area_bytes = plan.area_bytes;
  task.barriers = scratch;
  task.points = reinterpret_cast<T*>(scratch + plan.points);
  task.partial_sums = reinterpret_cast<double*>(scratch + plan.partial_sums);
  task.last = reinterpret_cast<T*>(scratch + plan.last);
  task.history = reinterpret_cast<T*>(scratch + plan.history);
  task.gram = reinterpret_cast<double*>(scratch + plan.gram);
}

}  // namespace cuda
}  // namespace fastdeq
