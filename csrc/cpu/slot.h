// A slot: the working memory of one sample while it is being solved, and its buffers.
//
// Buffers are padded to whole vectors, with zeros in the padding, plus 64 bytes: rows whose
// distance is a power of two would compete for the same few places in the cache.

#pragma once

#include "cpu/product.h"
#include "cpu/solve_task.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

// What a slot evaluates: an iterate of plain, heavy-ball or Anderson steps, the first iterate of a
// descent or Krylov space, a direction of conjugate gradients or Lanczos vector (the product
// alone), a trial of the descent or an iterate of MINRES to be verified.
enum class Mode : int8_t { kSteps, kOpen, kDirection, kTrial };

constexpr int kWork = 8;  // most buffers of a structured solver

// What every evaluation reads comes first, in as few lines of the cache as may be.
template <typename T>
struct alignas(64) Slot : Sample {
  PrecisionSchedule schedule;
  Mode mode;
  float change_scale;  // what `change` is to be multiplied by
  float next_scale;    // and `next_change`
  T* sums;             // (panels, kSums) vectors, see epilogue.h
  // (size): the point of evaluation, its value f(point), its pre-activation W point + c.
  T* point;
  T* value;
  T* pre;
  T* injection;
  T* best;  // the best verified iterate, and its pre-activation
  T* best_pre;
  // In low precision: this point minus the last one, and the next one minus this.
  std::byte *change, *next_change;
  T* last;         // heavy ball only: the last change of the point
  T* slope;        // adjoint only; the energy solver has its trials there
  T* work[kWork];  // see energy_slot.h and minres_slot.h

  T* f_history;  // Anderson only: (window + 1, stride) each, a ring
  T* g_history;
  double* gram;   // (window + 1, window + 1)
  int64_t entry;  // of the ring, where the next evaluation goes

  int64_t sample;
  T row_norm, largest;  // what the result is multiplied by

  double square, enough, t;  // energy: |residual|^2 of conjugate gradients, its goal, step length
  int32_t directions, halvings;  // of this step; of t
  bool near_rounding;            // energy: the step began near the rounding floor
  // MINRES: the last off-diagonal entry, the last rotation, entries rotated once, the residual
  // estimate, the part of the tolerance aimed at.
  double beta, cosine, sine, diagonal, corner, phi, aim;
  bool exhausted;           // the Krylov space
  double restart_residual;  // MINRES: best residual at the last restart that brought a gain
  int32_t vain_restarts;    // since
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
  const Solver solver = task.options.solver;
  const int work = solver == Solver::kEnergy ? 7 : solver == Solver::kMinres ? 6 : 0;
  return kBuffers + task.options.begins_with_momentum() + work;
}

template <typename T>
FASTDEQ_INLINE T* sums_of(const Slot<T>& slot, int64_t panel) {
  return slot.sums + kSums * kLanes<T> * panel;
}

inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename T>
int64_t sums_bytes(const SolveTask<T>& task) {
  return align(panels<T>(task.size) * kSums * FASTDEQ_VECTOR_BYTES);
}

template <typename T>
int64_t slot_bytes(const SolveTask<T>& task) {
  const int64_t row = stride_of<T>(task.size) * int64_t(sizeof(T));
  const int64_t entries = task.options.window + 1;
  int64_t bytes = sums_bytes(task) + buffers(task) * row;
  if (task.low_precision) bytes += 2 * align(2 * stride_of<T>(task.size));
  if (task.options.window > 0)
    bytes += 2 * entries * row + align(entries * entries * int64_t(sizeof(double)));
  return bytes;
}

// Room that the slots of a worker share: the small solve's work space and its weights.
template <typename T>
int64_t small_bytes(const SolveTask<T>& task) {
  const int64_t window = task.options.window;
  return align((small_solve_doubles(window) + window) * int64_t(sizeof(double)));
}

// Products with the triangle: a row for each slot and part.
template <typename T>
int64_t triangle_bytes(const SolveTask<T>& task) {
  return task.triangle_parts * task.slots * stride_of<T>(task.size) * int64_t(sizeof(T));
}

template <typename T>
int64_t scratch_bytes(const SolveTask<T>& task) {
  const int64_t tables = align(task.slots * int64_t(sizeof(Slot<T>))) +
                         align(task.slots * int64_t(sizeof(int32_t))) +
                         2 * align(task.slots * int64_t(sizeof(void*)));
  return tables + small_bytes(task) + triangle_bytes(task) + task.slots * slot_bytes(task);
}

template <typename T>
void place_buffers(const SolveTask<T>& task, Slot<T>& slot, std::byte* at) {
  const int64_t stride = stride_of<T>(task.size), entries = task.options.window + 1;
  const int64_t rows = buffers(task);
  slot.sums = reinterpret_cast<T*>(at);
  at += sums_bytes(task);
  T* row = reinterpret_cast<T*>(at);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = task.size; j < stride; ++j) row[i * stride + j] = 0;
  }
  slot.point = row;
  slot.value = row + stride;
  slot.pre = row + 2 * stride;
  slot.best = row + 3 * stride;
  slot.best_pre = row + 4 * stride;
  slot.injection = row + 5 * stride;
  slot.slope = row + 6 * stride;
  row += kBuffers * stride;
  slot.last = row;
  if (task.options.begins_with_momentum()) row += stride;
  for (int i = 0; i < kWork; ++i) slot.work[i] = row + i * stride;
  at += rows * stride * int64_t(sizeof(T));
  slot.change = at;
  slot.next_change = at + align(2 * stride);
  if (task.low_precision) at += 2 * align(2 * stride);  // written as far as they are read
  slot.f_history = slot.g_history = nullptr;
  slot.gram = nullptr;
  if (task.options.window > 0) {
    slot.f_history = reinterpret_cast<T*>(at);
    slot.g_history = slot.f_history + entries * stride;
    slot.gram = reinterpret_cast<double*>(slot.g_history + entries * stride);
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
