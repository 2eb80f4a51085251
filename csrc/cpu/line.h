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

// What a line evaluates: an iterate of plain or Anderson steps, one of heavy-ball steps, the first
// iterate of a descent or Krylov space, a direction of conjugate gradients or Lanczos vector (the
// product alone), a trial of the descent or an iterate that MINRES wants verified.
enum class Mode : int8_t { kSteps, kMomentum, kOpen, kDirection, kTrial };

constexpr int kWork = 8;  // most buffers of a structured solver

template <typename T>
struct Line {
  // (size): the point of evaluation, its value f(point), its pre-activation W point + c.
  T* point;
  T* value;
  T* pre;
  T* best;  // the best verified iterate, and its pre-activation
  T* best_pre;
  T* injection;
  T* slope;           // adjoint only; the energy solver has its trials there
  std::byte* change;  // ramp only: the next point minus this one, in bytes or bfloat16
  T* last;            // heavy ball only: the last change of the point
  T* work[kWork];     // see energy_line.h and minres_line.h
  T* f_history;       // Anderson only: (window + 1, stride) each
  T* g_history;
  double* gram;  // (window + 1, window + 1)

  int64_t sample;
  T row_norm, largest;         // what the result is multiplied by
  double* sums;                // (panels, kSums), see epilogue.h
  double norm, previous_norm;  // |f(point) - point|, now and one evaluation before
  T best_residual;
  int32_t iterations;
  int32_t idle;  // verified iterates in a row that brought no new best residual

  int64_t slot, count;  // of the history
  double trusted_norm;
  bool plain;  // no acceleration yet
  bool accelerated;
  int32_t rejects[kMostCounters];

  Mode mode;
  double radius, omega, led;  // heavy ball: estimate, omega of the next step, of the last one
  double norms[2];            // residual norms two and three evaluations before
  double mark;                // residual norm to be halved
  int32_t since;              // evaluations since it was set

  double square, enough, t;  // energy: |residual|^2 of conjugate gradients, its goal, step length
  int32_t made, halvings;    // directions, and halvings of t
  // MINRES: the last off-diagonal entry, the last rotation, entries rotated once, the residual
  // estimate, the part of the tolerance aimed at.
  double beta, cosine, sine, diagonal, corner, phi, aim;
  bool exhausted;  // the Krylov space
  bool floor;      // energy: the step began near the rounding floor
  T restarted_at;  // MINRES: best residual at the last restart that brought a gain
  int32_t vain;    // restarts since

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

template <typename P>
void swap(P*& a, P*& b) {
  P* const c = a;
  a = b;
  b = c;
}

template <typename T>
void copy(int64_t size, const T* from, T* to) {
  for (int64_t j = 0; j < size; j += kLanes<T>) store(to + j, load(from + j));
}

constexpr int kSums = 3;
constexpr int kBuffers = 7;  // point, value, pre, best, best_pre, injection, slope

template <typename T>
int64_t buffers(const SolveTask<T>& task) {
  const int work = task.solver == Solver::kEnergy ? 7 : task.solver == Solver::kMinres ? 6 : 0;
  return kBuffers + task.momentum + work;
}

inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename T>
int64_t sums_bytes(const SolveTask<T>& task) {
  return align(panels<T>(task.size) * kSums * int64_t(sizeof(double)));
}

template <typename T>
int64_t line_bytes(const SolveTask<T>& task) {
  const int64_t row = stride_of<T>(task.size) * int64_t(sizeof(T)), slots = task.window + 1;
  int64_t bytes = sums_bytes(task) + buffers(task) * row;
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

// Products with the triangle: a row for each line and part.
template <typename T>
int64_t triangle_bytes(const SolveTask<T>& task) {
  return task.triangle_parts * task.lines * stride_of<T>(task.size) * int64_t(sizeof(T));
}

template <typename T>
int64_t scratch_bytes(const SolveTask<T>& task) {
  const int64_t tables = align(task.lines * int64_t(sizeof(Line<T>))) +
                         align(task.lines * int64_t(sizeof(int32_t))) +
                         2 * align(task.lines * int64_t(sizeof(void*)));
  return tables + small_bytes(task) + triangle_bytes(task) + task.lines * line_bytes(task);
}

template <typename T>
void place_buffers(const SolveTask<T>& task, Line<T>& line, std::byte* at) {
  const int64_t stride = stride_of<T>(task.size), slots = task.window + 1;
  const int64_t rows = buffers(task);
  line.sums = reinterpret_cast<double*>(at);
  at += sums_bytes(task);
  T* row = reinterpret_cast<T*>(at);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = task.size; j < stride; ++j) row[i * stride + j] = 0;
  }
  line.point = row;
  line.value = row + stride;
  line.pre = row + 2 * stride;
  line.best = row + 3 * stride;
  line.best_pre = row + 4 * stride;
  line.injection = row + 5 * stride;
  line.slope = row + 6 * stride;
  row += kBuffers * stride;
  line.last = row;
  if (task.momentum) row += stride;
  for (int i = 0; i < kWork; ++i) line.work[i] = row + i * stride;
  at += rows * stride * int64_t(sizeof(T));
  line.change = at;
  if (task.ramp) at += align(2 * stride);  // written as far as it is read
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
