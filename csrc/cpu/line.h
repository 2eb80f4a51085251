// A line: the place of one sample while it is being solved, and its buffers.
//
// Buffers are padded to whole vectors, with zeros in the padding, plus 64 bytes: rows whose
// distance is a power of two would compete for the same few places in the cache.

#pragma once

#include "product.h"
#include "solve_task.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

enum class Kind : int8_t { kExact, kBfloat16, kBytes };

template <typename T>
struct Line {
  // (size): the point of evaluation, its value f(point), its pre-activation W point + c.
  T* point;
  T* value;
  T* pre;
  T* best;  // the best verified iterate, and its pre-activation
  T* best_pre;
  T* injection;
  T* slope;           // adjoint only
  std::byte* change;  // ramp only: the next point minus this one, in bytes or bfloat16
  T* f_history;       // Anderson only: (window + 1, stride) each
  T* g_history;
  double* gram;  // (window + 1, window + 1)

  int64_t sample;
  T row_norm, largest;         // what the result is multiplied by
  double* sums;                // (panels, 2): |f(point) - point|^2 and |f(point)|^2 of each
  double norm, previous_norm;  // |f(point) - point|, now and one evaluation before
  T best_residual;
  int32_t iterations;
  int32_t idle;  // verified iterates in a row that brought no new best residual

  int64_t slot, count;  // of the history
  double trusted_norm;
  bool plain;  // no acceleration yet
  bool accelerated;
  int32_t rejects[kCounters];

  Kind next;             // how the next evaluation is made
  Kind narrowest;        // how it may be made
  float change_scale;    // what `change` is to be multiplied by
  double anchor;         // relative residual at the last evaluation in full precision
  double goal;           // relative residual at which the next one is due
  double expected;       // relative residual expected of the next evaluation
  int32_t since_anchor;  // evaluations
};

template <typename T>
int64_t stride_of(int64_t size) {
  return round_up<T>(size) + 64 / int64_t(sizeof(T));
}

constexpr int kBuffers = 7;  // point, value, pre, best, best_pre, injection, slope

inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename T>
int64_t sums_bytes(const SolveTask<T>& task) {
  return align(panels<T>(task.size) * 2 * int64_t(sizeof(double)));
}

template <typename T>
int64_t line_bytes(const SolveTask<T>& task) {
  const int64_t row = stride_of<T>(task.size) * int64_t(sizeof(T)), slots = task.window + 1;
  int64_t bytes = sums_bytes(task) + kBuffers * row;
  if (task.ramp) bytes += align(2 * stride_of<T>(task.size));
  if (task.window > 0) bytes += 2 * slots * row + align(slots * slots * int64_t(sizeof(double)));
  return bytes;
}

// Room that the lines of a worker share: the small solve's work space and its weights.
template <typename T>
int64_t small_bytes(const SolveTask<T>& task) {
  const int64_t slots = task.window + 1;
  return align((slots * slots + slots) * int64_t(sizeof(double)));
}

template <typename T>
int64_t scratch_bytes(const SolveTask<T>& task) {
  const int64_t tables = align(task.lines * int64_t(sizeof(Line<T>))) +
                         align(task.lines * int64_t(sizeof(int32_t))) +
                         2 * align(task.lines * int64_t(sizeof(void*)));
  return tables + small_bytes(task) + task.lines * line_bytes(task);
}

template <typename T>
void place_buffers(const SolveTask<T>& task, Line<T>& line, std::byte* at) {
  const int64_t stride = stride_of<T>(task.size), slots = task.window + 1;
  line.sums = reinterpret_cast<double*>(at);
  at += sums_bytes(task);
  T* row = reinterpret_cast<T*>(at);
  for (int64_t i = 0; i < kBuffers * stride; ++i) row[i] = 0;
  line.point = row;
  line.value = row + stride;
  line.pre = row + 2 * stride;
  line.best = row + 3 * stride;
  line.best_pre = row + 4 * stride;
  line.injection = row + 5 * stride;
  line.slope = row + 6 * stride;
  at += kBuffers * stride * int64_t(sizeof(T));
  line.change = at;
  if (task.ramp) {
    const int64_t bytes = align(2 * stride);
    for (int64_t i = 0; i < bytes; ++i) at[i] = std::byte(0);
    at += bytes;
  }
  line.f_history = line.g_history = nullptr;
  line.gram = nullptr;
  if (task.window > 0) {
    line.f_history = reinterpret_cast<T*>(at);
    line.g_history = line.f_history + slots * stride;
    line.gram = reinterpret_cast<double*>(line.g_history + slots * stride);
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
