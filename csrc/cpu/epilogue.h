// What follows a product, per slot and panel: pre-activation, value, residual, next difference.
//
//   full   pre  = product + c, value = phi(pre), adjoint: D pre
//   low    pre += change_scale product; the product does not read the point, so a slot without
//            history has it replaced by the next one, and value (heavy ball: last) by the change
//   direction, full or low: value = product, nothing else
//   sums = |f(point) - point|^2, |f(point)|^2, of this panel, and the largest entry of the change
//
// The product comes from a buffer in the first-level cache; everything else is read and written
// once.

#pragma once

#include "cpu/activations.h"
#include "cpu/slot.h"
#include "cpu/sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename Activation>
struct Forward {
  template <typename T>
  static Vec<T> apply(Vec<T> pre, const Slot<T>&, int64_t) {
    return Activation::template value<T>(pre);
  }
};

struct Adjoint {
  template <typename T>
  static Vec<T> apply(Vec<T> pre, const Slot<T>& slot, int64_t j) {
    return load(slot.slope + j) * pre;
  }
};

// The sums where squares leave the range of T.
template <typename T>
void wide_sums(const Slot<T>& slot, int64_t begin, int64_t end, double* sums) {
  sums[0] = sums[1] = 0;
  for (int64_t j = begin; j < end; ++j) {
    const double value = slot.value[j], difference = value - double(slot.point[j]);
    sums[0] += difference * difference;
    sums[1] += value * value;
  }
}

// For the outputs begin <= j < end of one slot; begin is a multiple of a vector.
template <typename T, typename Map, bool kLow>
void epilogue(const SolveTask<T>& task, Slot<T>& slot, const T* product, int64_t begin,
              int64_t end) {
  const T* base = kLow ? slot.pre : slot.injection;
  const bool in_place = kLow && slot.plain, damped = task.options.damping != 1;
  const bool heavy = task.options.begins_with_momentum();
  const Vec<T> damping = splat<T>(T(task.options.damping)), scale = splat<T>(T(slot.change_scale));
  const Vec<T> omega = splat<T>(T(slot.omega)), momentum = splat<T>(T(slot.omega - 1));
  if (slot.mode == Mode::kDirection) {
    for (int64_t j = begin; j < end; j += kLanes<T>) {
      const Vec<T> v = load(product + (j - begin));
      store(slot.value + j, kLow ? v * scale : v);
    }
    return;
  }
  Vec<T> square_difference = {}, square_value = {}, largest = {};
  for (int64_t j = begin; j < end; j += kLanes<T>) {
    Vec<T> pre = load(product + (j - begin));
    pre = kLow ? pre * scale + load(base + j) : pre + load(base + j);
    Vec<T> value = Map::template apply<T>(pre, slot, j);
    if (end - j < kLanes<T>) value = keep_first<T>(value, end - j);
    const Vec<T> point = load(slot.point + j), difference = value - point;
    square_difference += difference * difference;
    square_value += value * value;
    store(slot.pre + j, pre);
    if (in_place && heavy) {
      const Vec<T> change = omega * difference + momentum * load(slot.last + j);
      largest = max(largest, abs(change));
      store(slot.point + j, point + change);
      store(slot.last + j, change);
    } else if (in_place) {
      const Vec<T> change = damped ? damping * difference : difference;
      largest = max(largest, abs(change));
      store(slot.point + j, damped ? point + change : value);
      store(slot.value + j, change);
    } else {
      store(slot.value + j, value);
    }
  }
  double* sums = slot.sums + kSums * (begin / kPanel<T>);
  sums[0] = double(sum(square_difference));
  sums[1] = double(sum(square_value));
  if (!in_place && !__builtin_isfinite(sums[0] + sums[1])) wide_sums(slot, begin, end, sums);
  if (in_place) {
    T most = 0;
    for (int i = 0; i < kLanes<T>; ++i) most = largest[i] > most ? largest[i] : most;
    sums[2] = double(most);
  }
}

template <typename T>
using Epilogue = void (*)(const SolveTask<T>&, Slot<T>&, const T*, int64_t, int64_t);

template <typename T, bool kLow>
Epilogue<T> epilogue_for(const SolveTask<T>& task) {
  if (task.slope != nullptr) return &epilogue<T, Adjoint, kLow>;
  int index = 0;
#define FASTDEQ_CHOOSE(name, functor) \
  if (index++ == task.activation) return &epilogue<T, Forward<functor>, kLow>;
  FASTDEQ_FOR_EACH_ACTIVATION(FASTDEQ_CHOOSE)
#undef FASTDEQ_CHOOSE
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
