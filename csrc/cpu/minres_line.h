// MINRES on one line; the algorithm, symbols and sources of fastdeq/solvers/minres.py.
//
// Per direction: one product and two passes over the rows of the line, 4 + 10 read and 1 + 5
// written.

#pragma once

#include "epilogue.h"
#include "sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr double kAim = 0.9, kDrift = 4;
constexpr int kMostVain = 2;

template <typename T>
struct MinresRows {
  T *base, *x, *y, *y_old, *w, *w_old;
};

template <typename T>
MinresRows<T> minres_rows(const Line<T>& line) {
  T* const* w = line.work;
  return {w[0], w[1], w[2], w[3], w[4], w[5]};
}

template <typename T>
FASTDEQ_INLINE Vec<T> root_of_slope(const Line<T>& line, int64_t j) {
  return sqrt(max(load(line.slope + j), T(0)));
}

// From the best iterate of heavy-ball steps: v_0 = h (g + q W), to be evaluated at h v_0.
template <typename T>
void minres_take_over(const SolveTask<T>& task, Line<T>& line) {
  const MinresRows<T> r = minres_rows(line);
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> h = root_of_slope(line, j), base = h * load(line.best_pre + j);
    store(r.base + j, base);
    store(line.point + j, h * base);
  }
}

// point = h y
template <typename T>
void minres_point(const SolveTask<T>& task, Line<T>& line) {
  const MinresRows<T> r = minres_rows(line);
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    store(line.point + j, root_of_slope(line, j) * load(r.y + j));
  }
}

// A Krylov space from the iterate h (v_0 + x), just evaluated. False when it is exact.
template <typename T>
bool minres_begin(const SolveTask<T>& task, Line<T>& line) {
  const MinresRows<T> r = minres_rows(line);
  Sum<T> square;
  const Vec<T> zero = {};
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> base = load(r.base + j) + load(r.x + j);
    const Vec<T> residual =
        keep_first<T>(root_of_slope(line, j) * load(line.pre + j) - base, task.size - j);
    store(r.base + j, base);
    store(r.y + j, residual);
    store(r.x + j, zero);
    store(r.y_old + j, zero);
    store(r.w + j, zero);
    store(r.w_old + j, zero);
    square.add(residual * residual);
  }
  line.phi = __builtin_sqrt(square.total());
  line.aim = kAim;
  line.exhausted = false;
  line.beta = line.sine = line.diagonal = line.corner = 0;
  line.cosine = -1;
  if (!(line.phi > 0)) return false;
  const Vec<T> scale = splat<T>(T(1 / line.phi));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) store(r.y + j, load(r.y + j) * scale);
  minres_point(task, line);
  return true;
}

// One Lanczos step, the product being in `value`; true when the iterate is to be verified.
template <typename T>
bool minres_direction(const SolveTask<T>& task, Line<T>& line) {
  MinresRows<T> r = minres_rows(line);
  Sum<T> inner, image_square;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> y = load(r.y + j), image = y - root_of_slope(line, j) * load(line.value + j);
    inner.add(y * image);
    image_square.add(image * image);
    store(line.value + j, image);
  }
  const double alpha = inner.total();
  Sum<T> square;
  const Vec<T> a = splat<T>(T(alpha)), b = splat<T>(T(line.beta));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> u = load(line.value + j) - a * load(r.y + j) - b * load(r.y_old + j);
    square.add(u * u);
    store(line.value + j, u);
  }
  const double beta = __builtin_sqrt(square.total());
  const double upper = line.cosine * line.diagonal + line.sine * alpha;
  const double middle = line.sine * line.diagonal - line.cosine * alpha;
  const double length = __builtin_sqrt(middle * middle + beta * beta);
  if (!(length > 0)) {  // singular, or NaN
    line.exhausted = true;
    return true;
  }
  const double cosine = middle / length, sine = beta / length, step = cosine * line.phi;
  const Vec<T> c0 = splat<T>(T(1 / length)), c1 = splat<T>(T(line.corner / length)),
               c2 = splat<T>(T(upper / length)), tau = splat<T>(T(step)),
               scale = splat<T>(T(beta > 0 ? 1 / beta : 1));
  Sum<T> size_square;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> y = load(r.y + j), next = scale * load(line.value + j), h = root_of_slope(line, j);
    const Vec<T> w = c0 * y - c1 * load(r.w_old + j) - c2 * load(r.w + j);
    const Vec<T> x = load(r.x + j) + tau * w, q = h * (load(r.base + j) + x);
    store(r.w_old + j, w);  // the two change places
    store(r.x + j, x);
    store(r.y_old + j, next);
    store(line.point + j, h * next);
    size_square.add(q * q);
  }
  line.work[2] = r.y_old, line.work[3] = r.y;
  line.work[4] = r.w_old, line.work[5] = r.w;
  line.beta = beta;
  line.corner = line.sine * beta;
  line.diagonal = -line.cosine * beta;
  line.cosine = cosine;
  line.sine = sine;
  line.phi = __builtin_fabs(sine * line.phi);
  const double floor = sizeof(T) == 4 ? 1.2e-6 : 2.3e-15;
  line.exhausted = !(beta > floor * __builtin_sqrt(image_square.total()));
  const double size = __builtin_sqrt(size_square.total());
  return line.exhausted || line.phi <= line.aim * task.tol * (size + task.residual_eps);
}

// point = h (v_0 + x), to be verified
template <typename T>
void minres_iterate(const SolveTask<T>& task, Line<T>& line) {
  const MinresRows<T> r = minres_rows(line);
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    store(line.point + j, root_of_slope(line, j) * (load(r.base + j) + load(r.x + j)));
  }
}

// After an evaluation in full precision that did not end the solve: the next one. False when stuck.
template <typename T>
bool minres_step(const SolveTask<T>& task, Line<T>& line, double relative) {
  const bool verified = line.mode == Mode::kTrial;
  line.mode = Mode::kDirection;
  if (!verified || line.exhausted || !(line.norm <= kDrift * line.phi)) {
    line.rejects[0] += verified;
    if (verified && line.norm < 0.5 * double(line.restarted_at)) {
      line.restarted_at = T(line.norm);
      line.vain = 0;
    } else if (verified && ++line.vain > kMostVain) {
      return false;
    }
    return minres_begin(task, line);
  }
  const double lower = task.tol / relative;
  line.aim *= (lower < 1 ? lower : 1) * kAim;
  minres_point(task, line);
  return true;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
