// One iteration of a solve for all samples, between two products by the library:
//
//   product (B, d)   W point, or in a narrow evaluation bf16(change) bf16(W), by the library
//   exact            pre = product + c                      c (B, d) the injection, or g
//   narrow           pre = previous pre + product           change = point - previous point
//   value            phi(pre), adjoint: D pre
//   judged           |value - point| and |value|, by the state machine of sample.cuh
//   next point       by the sample's solver
//
// One block per sample, of at most kLoopThreads threads, each on 16 bytes at a time where rows are
// aligned. A block reads one Order; that of a stopped sample says so, and the block is done.
//
// All samples that run are evaluated in one way, exact where one of them cannot do without; see
// Want. So with the ramp the rounding of a sample's iterates depends on its mates, and nothing else
// of it does; without the ramp nothing does.
//
// Plain, damped and heavy-ball steps are known before the evaluation is judged, and are taken in
// place, where it is made: the point is replaced by the next one. An exact evaluation keeps the old
// point, as the best iterate may prove to be that one: in that of two buffers which does not hold
// the best so far. With a history, value and difference go there, and the step follows.
//
// Bytes per sample and iteration for s bytes per number, n = d s; the adjoint reads another n:
//   plain, exact              5 n: product, c, point; point, best
//   plain, exact, ramp        6.5 n: pre and change (2 bytes per number) as well
//   plain, narrow             5.5 n: product, pre, point; pre, point, change
//   heavy ball                another 2 n
//   Anderson, p differences   6 n: product, c, point; f, g, best; (p + 1) n for a row of the Gram
//                             matrix and (p + 2) n for the mixing (2 p + 2 with damping), most of
//                             it from a cache; with the ramp 2.5 n more
//   and 2 (sizeof(Sample) + sizeof(Order)) for the scalars.
// Operations: one phi or slope per number, 7 others, and for Anderson 2 (p + 1) in float64 and 3 p.
//
// Compared with fastdeq/affine.py on the emulated machine of tests/cuda_emulator; compiled for
// sm_80 and sm_90. No GPU has run it yet: kLoopThreads and kGramTile are choices, not measurements.

#pragma once

#include "activations.cuh"
#include "device.cuh"
#include "loop_task.cuh"
#include "sample.cuh"
#include "warp_solve.cuh"

namespace fastdeq {
namespace cuda {

constexpr int kGramTile = 4;    // products of a row of the Gram matrix made at a time
constexpr int kLoopBlocks = 2;  // on a multiprocessor, so that 128 registers may be used
constexpr int kLoopWarps = kLoopThreads / kWarpLanes;

// The block's shared memory; behind it the small solve's, see LoopShared::bytes.
template <typename T>
struct LoopShared {
  Sample<T> sample;
  Decision decision;
  Order next;
  int32_t length;  // weights in use
  double partial[kLoopWarps * kGramTile];

  // window: differences kept.
  static constexpr size_t bytes(int64_t window) {
    const size_t p = size_t(window);
    return align(sizeof(LoopShared)) + sizeof(double) * (p * (p + 1) + p) +
           (sizeof(T) + sizeof(int32_t)) * p;
  }
  static constexpr FASTDEQ_HOST_DEVICE size_t align(size_t bytes) { return (bytes + 15) / 16 * 16; }

  __device__ double* work() {
    return reinterpret_cast<double*>(reinterpret_cast<unsigned char*>(this) +
                                     align(sizeof(LoopShared)));
  }
  __device__ double* gamma(int p) { return work() + p * (p + 1); }
  __device__ T* weight(int p) { return reinterpret_cast<T*>(gamma(p) + p); }
  __device__ int32_t* used(int p) { return reinterpret_cast<int32_t*>(weight(p) + p); }
};

// Evaluates the sample at its point and, in place, steps. `product` null: zeros.
template <typename T, int kPack, bool kRamp>
__device__ void evaluate(const LoopTask<T>& task, const T* product, int64_t sample,
                         const Order& order, bool exact, double (&sums)[2]) {
  using P = Pack<T, kPack>;
  const int64_t row = sample * task.size;
  const T* base = (exact ? task.offset : task.pre) + row;
  T* const before = task.best_row(1 - order.side, sample);
  const bool in_place = order.in_place, heavy = task.options.momentum;
  const T damping = T(task.options.damping), omega = T(order.omega), momentum = T(order.omega - 1);
  T square_difference = 0, square_value = 0;
  for_each_pack<kPack>(task.size, [&](int64_t j) {
    P pre = P::load(base + j), slope;
    if (product != nullptr) {
      const P more = P::load(product + row + j);
      for (int i = 0; i < kPack; ++i) pre[i] += more[i];
    }
    if constexpr (kRamp) pre.store(task.pre + row + j);
    if (task.slope != nullptr) slope = P::load(task.slope + row + j);
    const P point = P::load(task.point + row + j);
    P value, change;
    for (int i = 0; i < kPack; ++i) {
      value[i] = task.slope != nullptr ? slope[i] * pre[i] : activate(task.activation, pre[i]);
      change[i] = value[i] - point[i];
      square_difference += change[i] * change[i];
      square_value += value[i] * value[i];
    }
    if (exact) point.store(before + j);
    if (!in_place) {
      value.store(task.f_history + task.slot_row(sample, order.slot) + j);
      change.store(task.g_history + task.slot_row(sample, order.slot) + j);
      return;
    }
    if (heavy) {
      P last;
      if (momentum != 0) last = P::load(task.last + row + j);
      for (int i = 0; i < kPack; ++i) {
        change[i] = momentum != 0 ? omega * change[i] + momentum * last[i] : omega * change[i];
        value[i] = point[i] + change[i];
      }
      change.store(task.last + row + j);
    } else if (damping != 1) {
      for (int i = 0; i < kPack; ++i) {
        change[i] *= damping;
        value[i] = point[i] + change[i];
      }
    }
    value.store(task.point + row + j);
    if constexpr (kRamp) store_change(task.change + row + j, change);
  });
  sums[0] = double(square_difference);
  sums[1] = double(square_value);
}

// <g_k, g> for the newest and the `count` evaluations before it, into row and column k.
template <typename T, int kPack>
__device__ void extend_gram(const LoopTask<T>& task, int64_t sample, int slot, int count,
                            double* partial) {
  using P = Pack<T, kPack>;
  const int slots = task.options.window + 1;
  const T* g = task.g_history + task.slot_row(sample, 0);
  double* gram = task.gram + sample * slots * slots;
  for (int first = 0; first <= count; first += kGramTile) {
    double sums[kGramTile] = {};
    for_each_pack<kPack>(task.size, [&](int64_t j) {
      const P newest = P::load(g + slot * task.size + j);
#pragma unroll
      for (int t = 0; t < kGramTile; ++t) {
        if (first + t > count) break;  // the same for the whole block
        const P old = P::load(g + slot_of(slot, first + t, slots) * task.size + j);
        for (int i = 0; i < kPack; ++i) sums[t] += double(newest[i]) * double(old[i]);
      }
    });
    sum_warps(sums, partial);
    if (threadIdx.x < kGramTile && first + int(threadIdx.x) <= count) {
      const int other = int(slot_of(slot, first + threadIdx.x, slots));
      const double inner = sum_of_warps<kGramTile>(partial, threadIdx.x);
      gram[slot * slots + other] = gram[other * slots + slot] = inner;
    }
    __syncthreads();
  }
}

// The weights of the mixing step; the first `length` of `weight` and `used` are set, for all
// threads.
template <typename T>
__device__ void choose_weights(const LoopTask<T>& task, int64_t sample, int slot,
                               LoopShared<T>& shared) {
  const int p = task.options.window, slots = p + 1;
  if (threadIdx.x < kWarpLanes) {
    const AndersonOutcome outcome =
        solve_small_by_warp(task.gram + sample * slots * slots, slots, slot, shared.decision.count,
                            task.options.anderson, shared.work(), shared.gamma(p));
    if (threadIdx.x == 0) {
      mixed(shared.sample, outcome);
      int length = 0;
      for (int age = 1; age <= shared.decision.count; ++age) {
        const T weight = T(shared.gamma(p)[age - 1]);
        if (weight == 0) continue;
        shared.weight(p)[length] = weight;
        shared.used(p)[length++] = int32_t(slot_of(slot, age, slots));
      }
      shared.length = length;
    }
  }
  __syncthreads();
}

// The next point from the history.
template <typename T, int kPack, bool kRamp>
__device__ void step_from_history(const LoopTask<T>& task, int64_t sample, int slot,
                                  LoopShared<T>& shared) {
  using P = Pack<T, kPack>;
  const int window = task.options.window;
  const StepKind step = shared.decision.step;
  const int64_t row = sample * task.size;
  const T* f = task.f_history + task.slot_row(sample, 0);
  const T* g = task.g_history + task.slot_row(sample, 0);
  const int newest = step == StepKind::kTrusted ? int(slot_of(slot, 1, window + 1)) : slot;
  const T undamped = step == StepKind::kTrusted ? T(0) : T(1 - task.options.damping);
  const int length = step == StepKind::kMix ? shared.length : 0;
  for_each_pack<kPack>(task.size, [&](int64_t j) {
    const P f_new = P::load(f + newest * task.size + j);
    P g_new, next = f_new;
    if (undamped != 0) {  // else 0 times what is not finite would reach the point
      g_new = P::load(g + newest * task.size + j);
      for (int i = 0; i < kPack; ++i) next[i] -= undamped * g_new[i];
    }
    for (int u = 0; u < length; ++u) {
      const T weight = shared.weight(window)[u];
      const int64_t old = shared.used(window)[u] * task.size + j;
      const P f_old = P::load(f + old);
      P difference;
      for (int i = 0; i < kPack; ++i) difference[i] = f_new[i] - f_old[i];
      if (undamped != 0) {
        const P g_old = P::load(g + old);
        for (int i = 0; i < kPack; ++i) difference[i] -= undamped * (g_new[i] - g_old[i]);
      }
      for (int i = 0; i < kPack; ++i) next[i] -= weight * difference[i];
    }
    if (kRamp && shared.next.want != kExact) {
      P change = P::load(task.point + row + j);
      for (int i = 0; i < kPack; ++i) change[i] = next[i] - change[i];
      store_change(task.change + row + j, change);
    }
    next.store(task.point + row + j);
  });
}

template <typename T, int kPack, bool kRamp>
__global__ void __launch_bounds__(kLoopThreads, kLoopBlocks)
    step_kernel(const LoopTask<T> task, const T* product) {
  const int64_t sample = blockIdx.x, row = sample * task.size;
  const Order order = task.orders[sample];
  if (order.want == kStopped) return;
  LoopShared<T>& shared = *reinterpret_cast<LoopShared<T>*>(shared_memory());
  const bool exact = !kRamp || task.control->exact != 0;
  double sums[2];
  evaluate<T, kPack, kRamp>(task, product, sample, order, exact, sums);
  sum_warps(sums, shared.partial);
  if (threadIdx.x == 0) {
    shared.sample = task.samples[sample];
    // Another sample wanted this one exact: nothing can be said of its narrow evaluations.
    if (kRamp && exact && order.want == kNarrow) shared.sample.goal = HUGE_VAL;
    shared.decision =
        judge<kRamp>(shared.sample, task.options, std::sqrt(sum_of_warps<2>(shared.partial, 0)),
                     std::sqrt(sum_of_warps<2>(shared.partial, 1)), exact);
    shared.next = next_order(task.options, shared.sample, shared.decision, order, exact);
  }
  __syncthreads();
  const Decision decision = shared.decision;
  const int side = shared.next.side;

  if (decision.step == StepKind::kMix) {
    if (order.in_place) {  // the first accelerated step: value is the point, which was kept
      const int64_t slot_row = task.slot_row(sample, order.slot);
      const T* before = task.best_row(1 - order.side, sample);
      for_each_pack<kPack>(task.size, [&](int64_t j) {
        const Pack<T, kPack> value = Pack<T, kPack>::load(task.point + row + j);
        Pack<T, kPack> difference = Pack<T, kPack>::load(before + j);
        for (int i = 0; i < kPack; ++i) difference[i] = value[i] - difference[i];
        value.store(task.f_history + slot_row + j);
        difference.store(task.g_history + slot_row + j);
      });
    }
    extend_gram<T, kPack>(task, sample, order.slot, decision.count, shared.partial);
    choose_weights(task, sample, order.slot, shared);
  }
  if (decision.stop) {
    if (side == 1) copy_row<T, kPack>(task.other + row, task.best + row, task.size);
  } else if (decision.step == StepKind::kBest) {
    copy_row<T, kPack>(task.best_row(side, sample), task.point + row, task.size);
  } else if (!order.in_place) {
    step_from_history<T, kPack, kRamp>(task, sample, order.slot, shared);
  }
  if (threadIdx.x == 0) {
    if (decision.stop) write_results(task, sample, shared.sample, decision.status);
    task.samples[sample] = shared.sample;
    task.orders[sample] = shared.next;
    arrive(*task.control, task.conditions, shared.next.want);
  }
}

}  // namespace cuda
}  // namespace fastdeq
