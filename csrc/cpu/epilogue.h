// What follows a product, per slot and panel: pre-activation, value, residual, next difference.
//
//   full   pre  = product + c, value = phi(pre), adjoint: D pre
//   low    pre += change_scale product; the product does not read the point, so a slot without
//            history has it replaced by the next one, and the change rounded (rounding.h)
//   direction, full or low: value = product, nothing else
//   sums = |f(point) - point|^2, |f(point)|^2, and of low ones the largest entry of the change: a
//          vector each for this panel, which the step adds up, once for the row (rounding.h,
//          worker.h)
//
// The product comes from a buffer in the first-level cache; everything else is read and written
// once.

#pragma once

#include "cpu/activations.h"
#include "cpu/rounding.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T, typename Activation>
struct Forward {
  explicit Forward(const Slot<T>&) {}
  FASTDEQ_INLINE Vec<T> operator()(Vec<T> pre, int64_t) const {
    return Activation::template value<T>(pre);
  }
};

template <typename T>
struct Adjoint {
  explicit Adjoint(const Slot<T>& slot) : slope(slot.slope) {}
  FASTDEQ_INLINE Vec<T> operator()(Vec<T> pre, int64_t j) const { return load(slope + j) * pre; }
  const T* slope;
};

// What becomes of f(point): `kStore` leaves it in value for a step to come; the others, in low
// precision, take the step in place, a plain one or one with momentum.
enum class Finish { kStore, kPlain, kHeavyBall };

// For the outputs begin <= j < end of one slot; begin is a multiple of a vector.
template <typename T, typename Map, bool kLow, Finish kFinish>
void epilogue_to(const SolveTask<T>& task, Slot<T>& slot, const T* product, int64_t begin,
                 int64_t end) {
#if defined(FASTDEQ_LOW_PRECISION)
  const Rounding round(slot.schedule.next == Products::kInt8, slot.next_scale, slot.next_change);
#endif
  // In registers: for all the compiler knows a store may change the slot.
  const T* const base = kLow ? slot.pre : slot.injection;
  T *const point = slot.point, *const value = slot.value, *const pre = slot.pre;
  T* const last = slot.last;
  const Map map(slot);
  const bool damped = task.options.damping != 1;
  const Vec<T> scale = splat<T>(T(slot.change_scale)), damping = splat<T>(T(task.options.damping));
  const Vec<T> omega = splat<T>(T(slot.omega)), momentum = splat<T>(T(slot.omega - 1));
  Vec<T> square_difference = {}, square_value = {}, largest = {};
  const auto finish = [&](int64_t j, int64_t used) __attribute__((always_inline)) {
    const Vec<T> p = load(product + (j - begin));
    const Vec<T> a = kLow ? p * scale + load(base + j) : p + load(base + j);
    Vec<T> v = map(a, j);
    if (used < kLanes<T>) v = keep_first<T>(v, used);
    const Vec<T> at = load(point + j), difference = v - at;
    square_difference += difference * difference;
    square_value += v * v;
    store(pre + j, a);
    if constexpr (kFinish == Finish::kStore) {
      store(value + j, v);
    } else {
      Vec<T> change = damped ? damping * difference : difference;
      if constexpr (kFinish == Finish::kHeavyBall) {
        change = omega * difference + momentum * load(last + j);
      }
      largest = max(largest, abs(change));
      const Vec<T> rounded = round(change, j);
      store(point + j, at + rounded);
      if constexpr (kFinish == Finish::kHeavyBall) store(last + j, rounded);
    }
  };
  int64_t j = begin;
  for (; j + kLanes<T> <= end; j += kLanes<T>) finish(j, kLanes<T>);
  if (j < end) finish(j, end - j);
  T* const sums = sums_of(slot, begin / kPanel<T>);
  store(sums, square_difference);
  store(sums + kLanes<T>, square_value);
  if constexpr (kFinish != Finish::kStore) store(sums + 2 * kLanes<T>, largest);
}

template <typename T, typename Map, bool kLow>
void epilogue(const SolveTask<T>& task, Slot<T>& slot, const T* product, int64_t begin,
              int64_t end) {
  if (slot.mode == Mode::kDirection) {
    const Vec<T> scale = splat<T>(T(slot.change_scale));
    for (int64_t j = begin; j < end; j += kLanes<T>) {
      const Vec<T> v = load(product + (j - begin));
      store(slot.value + j, kLow ? v * scale : v);
    }
    return;
  }
  if constexpr (kLow) {
    if (slot.plain && task.options.begins_with_momentum()) {
      return epilogue_to<T, Map, kLow, Finish::kHeavyBall>(task, slot, product, begin, end);
    }
    if (slot.plain) {
      return epilogue_to<T, Map, kLow, Finish::kPlain>(task, slot, product, begin, end);
    }
  }
  epilogue_to<T, Map, kLow, Finish::kStore>(task, slot, product, begin, end);
}

struct Norms {
  double difference, value;  // |f(point) - point|, |f(point)|
};

// After the evaluation of all panels; `in_place`: the point is not there any more.
template <typename T>
Norms norms_of(const SolveTask<T>& task, const Slot<T>& slot, bool in_place) {
  Sum<T> square_difference, square_value;
  for (int64_t panel = 0; panel < panels<T>(task.size); ++panel) {
    const T* sums = sums_of(slot, panel);
    square_difference.add(load(sums));
    square_value.add(load(sums + kLanes<T>));
  }
  double difference = square_difference.total(), value = square_value.total();
  if (!in_place && !__builtin_isfinite(difference + value)) {  // squares leave the range of T
    difference = value = 0;
    for (int64_t j = 0; j < task.size; ++j) {
      const double v = slot.value[j], d = v - double(slot.point[j]);
      difference += d * d;
      value += v * v;
    }
  }
  return {__builtin_sqrt(difference), __builtin_sqrt(value)};
}

template <typename T>
using Epilogue = void (*)(const SolveTask<T>&, Slot<T>&, const T*, int64_t, int64_t);

template <typename T, bool kLow>
Epilogue<T> epilogue_for(const SolveTask<T>& task) {
  if constexpr (!kLow || kHasLowPrecision<T>) {
    if (task.slope != nullptr) return &epilogue<T, Adjoint<T>, kLow>;
    int index = 0;
#define FASTDEQ_CHOOSE(name, functor) \
  if (index++ == task.activation) return &epilogue<T, Forward<T, functor>, kLow>;
    FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_CHOOSE)
#undef FASTDEQ_CHOOSE
  }
  return nullptr;
}

template <typename T, typename Activation>
void activate_all(int derivative, const T* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t n = count - i < kLanes<T> ? count - i : kLanes<T>;
    const Vec<T> p = load_partial(in + i, int(n));
    store_partial(out + i,
                  derivative ? Activation::template slope<T>(p) : Activation::template value<T>(p),
                  int(n));
  }
}

template <typename T>
void activate(int activation, int derivative, const T* in, T* out, int64_t count) {
  int index = 0;
#define FASTDEQ_CHOOSE(name, functor) \
  if (index++ == activation) return activate_all<T, functor>(derivative, in, out, count);
  FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_CHOOSE)
#undef FASTDEQ_CHOOSE
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
