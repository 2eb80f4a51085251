// The energy solver on one slot; the algorithm, symbols and sources of fastdeq/solvers/energy.py.
//
// Per direction of conjugate gradients: one product and three passes over the rows of the slot,
// 4 + 5 + 3 read and 0 + 2 + 2 written. Directions may be rounded to bfloat16: an inexact Newton
// step asks for no more, and every trial is evaluated in full precision.

#pragma once

#include "cpu/epilogue.h"
#include "cpu/sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
struct EnergyRows {
  T *a, *z, *s, *h, *da, *residual, *direction, *trial;
};

// The trial takes the place of the adjoint's slope, which a forward solve has no use for.
template <typename T>
EnergyRows<T> energy_rows(const Slot<T>& slot) {
  T* const* w = slot.work;
  return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], slot.slope};
}

// point = phi(from)
template <typename T, typename Activation>
void energy_point(const SolveTask<T>& task, Slot<T>& slot, const T* from) {
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> z = Activation::template value<T>(load(from + j));
    store(slot.point + j, keep_first<T>(z, task.size - j));
  }
}

// A new step from `at` = phi(a), just evaluated.
template <typename T, typename Activation>
void energy_begin(const SolveTask<T>& task, Slot<T>& slot, const T* at, double relative) {
  const EnergyRows<T> r = energy_rows(slot);
  Sum<T> square;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> a = load(r.a + j), s = keep_first<T>(load(slot.pre + j) - a, task.size - j);
    const Vec<T> h = sqrt(Activation::template slope<T>(a)), rhs = h * s;
    square.add(rhs * rhs);
    store(r.z + j, load(at + j));
    store(r.s + j, s);
    store(r.h + j, h);
    store(r.da + j, s);
    store(r.residual + j, rhs);
    store(r.direction + j, rhs);
    store(slot.point + j, h * rhs);
  }
  const double forcing = __builtin_fmin(kMostForcing, __builtin_pow(relative, kForcingPower));
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  slot.square = square.total();
  slot.enough = forcing * forcing * slot.square;
  slot.directions = slot.halvings = 0;
  slot.t = 1;
  slot.near_rounding = relative < kRoundingFloor * epsilon;
  const bool low = task.low_precision && forcing >= kLowPrecisionForcing;
  slot.schedule.lowest = low ? Products::kBfloat16 : Products::kFull;
}

// Whether E at the trial, evaluated at `at`, is low enough.
template <typename T, typename Activation>
bool energy_falls(const SolveTask<T>& task, const Slot<T>& slot, const T* at) {
  const EnergyRows<T> r = energy_rows(slot);
  Sum<T> change, promised;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> a = load(r.a + j), trial = load(r.trial + j), s = load(r.s + j);
    const Vec<T> z = load(r.z + j), next = load(at + j), pre = load(slot.pre + j);
    const Vec<T> slope = Activation::template slope<T>(a);
    const Vec<T> slope_next = Activation::template slope<T>(trial);
    const Vec<T> da = trial - a, dz = next - z;
    Vec<T> kappa = T(0.5) * da * (z + next) - (Activation::template primitive<T>(trial) -
                                               Activation::template primitive<T>(a));
    if (Activation::kSmooth) {
      kappa = select(abs(da) < T(kSmallStep), da * da * (slope_next - slope) / T(12), kappa);
    }
    // On one linear piece, or one saturated side, this is rounding error alone.
    const Vec<T> one_side = select((trial > T(0)) == (a > T(0)), splat(T(0)), kappa);
    kappa = select(slope == slope_next, one_side, kappa);
    change.add(keep_first<T>(kappa - T(0.5) * (s + (pre - trial)) * dz, task.size - j));
    promised.add(keep_first<T>(slope * s * da, task.size - j));
  }
  return change.total() <= -kSufficientDecrease * promised.total();  // false for NaN
}

template <typename T>
struct EnergyFunctions {
  void (*point)(const SolveTask<T>&, Slot<T>&, const T*);
  void (*begin)(const SolveTask<T>&, Slot<T>&, const T*, double);
  bool (*falls)(const SolveTask<T>&, const Slot<T>&, const T*);
};

template <typename T, typename Activation>
EnergyFunctions<T> energy_functions() {
  if constexpr (Activation::kMonotone) {
    return {&energy_point<T, Activation>, &energy_begin<T, Activation>,
            &energy_falls<T, Activation>};
  }
  return {};
}

template <typename T>
EnergyFunctions<T> energy_functions_for(const SolveTask<T>& task) {
  if (task.options.solver != Solver::kEnergy) return {};
  int index = 0;
#define FASTDEQ_CHOOSE(name, functor) \
  if (index++ == task.activation) return energy_functions<T, functor>();
  FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_CHOOSE)
#undef FASTDEQ_CHOOSE
  return {};
}

// One step of conjugate gradients, the product being in `value`; true when they are done.
template <typename T>
bool energy_direction(const SolveTask<T>& task, Slot<T>& slot) {
  const EnergyRows<T> r = energy_rows(slot);
  Sum<T> lengths, curvatures, squares;
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> d = load(r.direction + j);
    const Vec<T> image = d - load(r.h + j) * load(slot.value + j);
    lengths.add(d * d);
    curvatures.add(d * image);
  }
  const double curvature = curvatures.total(), length = lengths.total();
  if (!(curvature > kLeastCurvature * length)) {  // true for NaN
    ++slot.rejects[1];
    if (!__builtin_isfinite(curvature)) return true;
    const double negative = -curvature, least = kAssumedCurvature * length;
    const Vec<T> alpha = splat<T>(T(slot.square / (negative > least ? negative : least)));
    for (int64_t j = 0; j < task.size; j += kLanes<T>) {
      store(r.da + j, load(r.da + j) + alpha * load(slot.value + j));
    }
    return true;
  }
  const Vec<T> alpha = splat<T>(T(slot.square / curvature));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> product = load(slot.value + j), h = load(r.h + j);
    const Vec<T> image = load(r.direction + j) - h * product;
    const Vec<T> residual = load(r.residual + j) - alpha * image;
    store(r.da + j, load(r.da + j) + alpha * product);
    store(r.residual + j, residual);
    squares.add(residual * residual);
  }
  const double square = squares.total();
  const Vec<T> beta = splat<T>(T(square / slot.square));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    const Vec<T> d = load(r.residual + j) + beta * load(r.direction + j);
    store(r.direction + j, d);
    store(slot.point + j, load(r.h + j) * d);
  }
  slot.square = square;
  return square <= slot.enough || ++slot.directions >= task.options.most_directions;
}

// The next trial: a + t da.
template <typename T>
void energy_trial(const SolveTask<T>& task, Slot<T>& slot, const EnergyFunctions<T>& functions) {
  const EnergyRows<T> r = energy_rows(slot);
  const Vec<T> t = splat<T>(T(slot.t));
  for (int64_t j = 0; j < task.size; j += kLanes<T>) {
    store(r.trial + j, load(r.a + j) + t * load(r.da + j));
  }
  functions.point(task, slot, r.trial);
}

// After an evaluation in full precision at `at`: the next evaluation. False when stuck.
template <typename T>
bool energy_step(const SolveTask<T>& task, Slot<T>& slot, const T* at, double relative,
                 const EnergyFunctions<T>& functions) {
  const EnergyRows<T> r = energy_rows(slot);
  if (slot.mode == Mode::kTrial) {
    if (!functions.falls(task, slot, at)) {
      ++slot.rejects[0];
      if (++slot.halvings > (slot.near_rounding ? kFloorHalvings : kMostHalvings)) return false;
      slot.t *= 0.5;
      if (slot.halvings == kNewtonHalvings) {
        copy(task.size, r.s, r.da);
        slot.t = 1;
      }
      energy_trial(task, slot, functions);
      return true;
    }
    for (int64_t j = 0; j < task.size; j += kLanes<T>) store(r.a + j, load(r.trial + j));
  }
  functions.begin(task, slot, at, relative);
  if (slot.square > 0) {
    slot.mode = Mode::kDirection;
  } else {  // D = 0 everywhere, or nothing left to gain but by the plain step
    slot.mode = Mode::kTrial;
    energy_trial(task, slot, functions);
  }
  return true;
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
