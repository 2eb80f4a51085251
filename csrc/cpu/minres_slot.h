// MINRES on one slot; the algorithm, symbols and sources of fastdeq/solvers/minres.py.
//
// Per direction: one product and two passes over the rows of the slot, 4 + 10 read and 1 + 5
// written.

#pragma once

#include "cpu/epilogue.h"
#include "cpu/sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
struct MinresRows {
  T *base, *x, *y, *y_old, *w, *w_old;
};

template <typename T>
MinresRows<T> minres_rows(const Slot<T>& slot) {
  T* const* w = slot.work;
  return {w[0], w[1], w[2], w[3], w[4], w[5]};
}

template <typename T>
FASTDEQ_INLINE Vec<T> root_of_slope(const Slot<T>& slot, int64_t j) {
  return sqrt(max(load(slot.slope + j), T(0)));
}

// From the best iterate of heavy-ball steps: v_0 = h (g + q W), to be evaluated at h v_0.
template <typename T>
void minres_first(const SolveTask<T>& task, Slot<T>& slot) {
  const MinresRows<T> r = minres_rows(slot);
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> h = root_of_slope(slot, j), base = h * load(slot.best_pre + j);
    store(r.base + j, base);
    store(slot.point + j, h * base);
  }
}

// point = h y
template <typename T>
void minres_point(const SolveTask<T>& task, Slot<T>& slot) {
  const MinresRows<T> r = minres_rows(slot);
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    store(slot.point + j, root_of_slope(slot, j) * load(r.y + j));
  }
}

// A Krylov space from the iterate h (v_0 + x), just evaluated. False when it is exact.
template <typename T>
bool minres_begin(const SolveTask<T>& task, Slot<T>& slot) {
  const MinresRows<T> r = minres_rows(slot);
  Sum<T> square;
  const Vec<T> zero = {};
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> base = load(r.base + j) + load(r.x + j);
    const Vec<T> residual =
        keep_first<T>(root_of_slope(slot, j) * load(slot.pre + j) - base, task.size - j);
    store(r.base + j, base);
    store(r.y + j, residual);
    store(r.x + j, zero);
    store(r.y_old + j, zero);
    store(r.w + j, zero);
    store(r.w_old + j, zero);
    square.add(residual * residual);
  }
  slot.phi = __builtin_sqrt(square.total());
  slot.aim = kEstimateFraction;
  slot.exhausted = false;
  slot.beta = slot.sine = slot.diagonal = slot.corner = 0;
  slot.cosine = -1;
  if (!(slot.phi > 0)) return false;
  const Vec<T> scale = splat<T>(T(1 / slot.phi));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) store(r.y + j, load(r.y + j) * scale);
  minres_point(task, slot);
  return true;
}

// One Lanczos step, the product being in `value`; true when the iterate is to be verified.
template <typename T>
bool minres_direction(const SolveTask<T>& task, Slot<T>& slot) {
  MinresRows<T> r = minres_rows(slot);
  Sum<T> inner, image_square;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> y = load(r.y + j), image = y - root_of_slope(slot, j) * load(slot.value + j);
    inner.add(y * image);
    image_square.add(image * image);
    store(slot.value + j, image);
  }
  const double alpha = inner.total();
  Sum<T> square;
  const Vec<T> a = splat<T>(T(alpha)), b = splat<T>(T(slot.beta));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> u = load(slot.value + j) - a * load(r.y + j) - b * load(r.y_old + j);
    square.add(u * u);
    store(slot.value + j, u);
  }
  const double beta = __builtin_sqrt(square.total());
  const double upper = slot.cosine * slot.diagonal + slot.sine * alpha;
  const double middle = slot.sine * slot.diagonal - slot.cosine * alpha;
  const double length = __builtin_sqrt(middle * middle + beta * beta);
  if (!(length > 0)) {  // singular, or NaN
    slot.exhausted = true;
    return true;
  }
  const double cosine = middle / length, sine = beta / length, step = cosine * slot.phi;
  const Vec<T> c0 = splat<T>(T(1 / length)), c1 = splat<T>(T(slot.corner / length)),
               c2 = splat<T>(T(upper / length)), tau = splat<T>(T(step)),
               scale = splat<T>(T(beta > 0 ? 1 / beta : 1));
  Sum<T> size_square;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> y = load(r.y + j), next = scale * load(slot.value + j), h = root_of_slope(slot, j);
    const Vec<T> w = c0 * y - c1 * load(r.w_old + j) - c2 * load(r.w + j);
    const Vec<T> x = load(r.x + j) + tau * w, q = h * (load(r.base + j) + x);
    store(r.w_old + j, w);  // the two change places
    store(r.x + j, x);
    store(r.y_old + j, next);
    store(slot.point + j, h * next);
    size_square.add(q * q);
  }
  slot.work[2] = r.y_old, slot.work[3] = r.y;
  slot.work[4] = r.w_old, slot.work[5] = r.w;
  slot.beta = beta;
  slot.corner = slot.sine * beta;
  slot.diagonal = -slot.cosine * beta;
  slot.cosine = cosine;
  slot.sine = sine;
  slot.phi = __builtin_fabs(sine * slot.phi);
  constexpr double floor = kKrylovFloor * std::numeric_limits<T>::epsilon();
  slot.exhausted = !(beta > floor * __builtin_sqrt(image_square.total()));
  const double size = __builtin_sqrt(size_square.total());
  const double goal = task.options.atol + task.options.tol * (size + kResidualEps);
  return slot.exhausted || slot.phi <= slot.aim * goal;
}

// point = h (v_0 + x), to be verified
template <typename T>
void minres_iterate(const SolveTask<T>& task, Slot<T>& slot) {
  const MinresRows<T> r = minres_rows(slot);
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    store(slot.point + j, root_of_slope(slot, j) * (load(r.base + j) + load(r.x + j)));
  }
}

// After an evaluation in full precision that did not end the solve: the next one. False when stuck.
template <typename T>
bool minres_step(const SolveTask<T>& task, Slot<T>& slot, double relative) {
  const bool verified = slot.mode == Mode::kTrial;
  slot.mode = Mode::kDirection;
  if (!verified || slot.exhausted || !(slot.norm <= kDrift * slot.phi)) {
    slot.rejects[0] += verified;
    if (verified && slot.norm < 0.5 * slot.restart_residual) {
      slot.restart_residual = slot.norm;
      slot.vain_restarts = 0;
    } else if (verified && ++slot.vain_restarts > kMostVainRestarts) {
      return false;
    }
    return minres_begin(task, slot);
  }
  const double lower = tolerance_at(task.options, slot.norm, relative) / relative;
  slot.aim *= (lower < 1 ? lower : 1) * kEstimateFraction;
  minres_point(task, slot);
  return true;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
