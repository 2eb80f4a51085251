// What the kernels of loop.cuh work on, how a sample's next evaluation is ordered, and how the
// blocks of an iteration decide together what the next one is.

#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "activations.cuh"
#include "device.cuh"
#include "sample.cuh"

namespace fastdeq {
namespace cuda {

constexpr int kLoopThreads = 256;

// A batch is evaluated in one way. Samples that are due for an exact evaluation wait for each
// other, until all that run are, or one has waited for so many evaluations. For 64 samples of
// d = 128, random weights, tolerances from 1e-3 to 1e-5, that took 3 to 5 exact products where a
// batch that waits for no one took 6 to 16, in as many iterations.
constexpr int kLongestWait = 4;

// Threads of a block for rows of `size` numbers, `pack` at a time.
inline unsigned loop_threads(int64_t size, int pack) {
  const int64_t threads = (size + pack - 1) / pack;
  return threads < kLoopThreads ? unsigned(threads + 31) / 32 * 32 : unsigned(kLoopThreads);
}

// kCount neighbours in a row, moved in one access where their address is a multiple of their size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];

  __device__ T& operator[](int i) { return at[i]; }
  __device__ const T& operator[](int i) const { return at[i]; }
  static __device__ Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Pack*>(to) = *this; }
};

// Calls body(j) for the numbers of a row that are this thread's, the same ones every time.
template <int kPack, typename Body>
__device__ void for_each_pack(int64_t size, const Body& body) {
  for (int64_t j = int64_t(threadIdx.x) * kPack; j < size; j += int64_t(blockDim.x) * kPack) {
    body(j);
  }
}

// To nearest, ties to even.
FASTDEQ_HOST_DEVICE inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T, int kPack>
__device__ void store_change(uint16_t* to, const Pack<T, kPack>& change) {
  Pack<uint16_t, kPack> rounded;
  for (int i = 0; i < kPack; ++i) rounded[i] = to_bfloat16(float(change[i]));
  rounded.store(to);
}

template <typename T, int kPack>
__device__ void copy_row(const T* from, T* to, int64_t size) {
  for_each_pack<kPack>(size, [&](int64_t j) { Pack<T, kPack>::load(from + j).store(to + j); });
}

// The sum over the lanes of a warp, in every lane.
__device__ inline double sum_lanes(double value) {
  for (int bits = kWarpLanes / 2; bits > 0; bits /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, bits);
  }
  return value;
}

// Leaves the sums of each warp in partial[warp * N + i], for all threads.
template <int N>
__device__ void sum_warps(const double (&values)[N], double* partial) {
  const int warp = threadIdx.x / kWarpLanes;
  for (int i = 0; i < N; ++i) {
    const double sum = sum_lanes(values[i]);
    if (threadIdx.x % kWarpLanes == 0) partial[warp * N + i] = sum;
  }
  __syncthreads();
}

template <int N>
__device__ double sum_of_warps(const double* partial, int i) {
  double sum = 0;
  for (int warp = 0; warp < int(blockDim.x) / kWarpLanes; ++warp) sum += partial[warp * N + i];
  return sum;
}

// What a sample's next evaluation is to be. kWaiting: exact, as its narrow evaluations have come as
// far as they are good for, but it can go on with them for a while.
enum Want : int32_t { kStopped = 0, kExact = 1, kNarrow = 2, kWaiting = 3 };

struct Order {
  int32_t want;
  int32_t waited;    // evaluations since it began to wait
  int32_t in_place;  // the step is known before the evaluation is judged
  int32_t side;      // which of the two buffers has the best iterate
  int32_t slot;      // of the history
  double omega;      // of the heavy-ball step
};

// Of the whole batch. While samples run there is one arrival of each per iteration; the last one
// prepares the next iteration.
struct Control {
  unsigned long long arrived;  // and, from bit 32 on, how many of them have stopped
  int32_t running;             // at the begin of the iteration
  int32_t exact;               // how it is evaluated
  int32_t exact_next;          // a sample cannot do without an exact one next
  int32_t waiting;             // samples that wait for an exact one
};

// Of a CUDA graph with conditional nodes: whether to go on, and by which product. Handles are of
// type cudaGraphConditionalHandle.
struct Conditions {
  bool in_graph = false, choose = false;  // there is a loop; it has products of both kinds
  unsigned long long loop = 0, exact = 0, narrow = 0;
};

template <typename T>
struct LoopTask {
  SolveOptions options;
  int64_t batch = 0, size = 0;
  int activation = -1;
  int counters = 0;

  // (batch, size), contiguous.
  const T* offset = nullptr;
  const T* slope = nullptr;  // null: forward
  const T* start = nullptr;  // null: zeros
  T* point = nullptr;
  T* best = nullptr;  // the best iterate, in one of two buffers; in the end in this one
  T* other = nullptr;
  T* last = nullptr;           // heavy ball: the last change of the point
  T* pre = nullptr;            // ramp
  uint16_t* change = nullptr;  // ramp, bfloat16

  T* f_history = nullptr;  // Anderson: (batch, window + 1, size)
  T* g_history = nullptr;
  double* gram = nullptr;  // (batch, window + 1, window + 1)

  Sample<T>* samples = nullptr;
  Order* orders = nullptr;
  Control* control = nullptr;
  Conditions conditions;

  int8_t* status = nullptr;
  int32_t* iterations = nullptr;
  T* residual = nullptr;
  int32_t* rejects = nullptr;

  __device__ T* best_row(int side, int64_t sample) const {
    return (side == 0 ? best : other) + sample * size;
  }
  __device__ int64_t slot_row(int64_t sample, int slot) const {
    return (sample * (options.window + 1) + slot) * size;
  }
};

// Damped steps of a sample that may be accelerated later are made from the history: value could not
// be had back from them.
template <typename T>
FASTDEQ_HOST_DEVICE bool steps_in_place(const SolveOptions& o, const Sample<T>& s) {
  return s.plain && (o.window == 0 || o.damping == 1);
}

// What comes after an evaluation that has been judged; `order` led to it.
template <typename T>
FASTDEQ_HOST_DEVICE Order next_order(const SolveOptions& o, const Sample<T>& s, const Decision& d,
                                     const Order& order, bool exact) {
  Order next{kExact, 0, steps_in_place(o, s), order.side, order.slot + 1, s.omega};
  if (order.slot == o.window) next.slot = 0;
  if (d.improved) next.side = 1 - order.side;
  const bool jump = d.step == StepKind::kBest || d.step == StepKind::kTrusted;
  const bool fresh = !s.plain && (s.count == 0 || !std::isfinite(s.goal));
  if (d.stop) {
    next.want = kStopped;
  } else if (d.narrow) {
    next.want = kNarrow;
  } else if (s.narrow_allowed && s.iterations < o.max_iter && !jump && !fresh) {
    next.waited = order.want == kWaiting && !exact ? order.waited + 1 : 0;
    if (next.waited < kLongestWait) next.want = kWaiting;
  }
  return next;
}

template <typename T>
__device__ void write_results(const LoopTask<T>& task, int64_t sample, const Sample<T>& s,
                              Status status) {
  task.status[sample] = int8_t(status);
  task.iterations[sample] = s.iterations;
  task.residual[sample] = s.best_residual;
  for (int i = 0; i < task.counters; ++i) {
    task.rejects[sample * task.counters + i] = s.rejects[i];
  }
}

__device__ inline void set_conditions(const Conditions& conditions, bool loop, bool exact) {
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12040
  if (!conditions.in_graph) return;
  cudaGraphSetConditional(conditions.loop, loop);
  if (!conditions.choose) return;
  cudaGraphSetConditional(conditions.exact, loop && exact);
  cudaGraphSetConditional(conditions.narrow, loop && !exact);
#endif
}

// Called by one thread for each sample that was running when the iteration began.
__device__ inline void arrive(Control& control, const Conditions& conditions, int32_t want) {
  const int running = control.running;
  const bool stopped = want == kStopped;
  if (want == kExact) __stcg(&control.exact_next, 1);
  if (want == kWaiting) atomicAdd(&control.waiting, 1);
  __threadfence();
  const unsigned long long one = 1 | static_cast<unsigned long long>(stopped) << 32;
  const unsigned long long before = atomicAdd(&control.arrived, one);
  if (int(before & 0xffffffffu) + 1 != running) return;
  __threadfence();
  const int remaining = running - int(before >> 32) - stopped;
  const bool exact = __ldcg(&control.exact_next) != 0 || __ldcg(&control.waiting) == remaining;
  control = {0, remaining, exact, 0, 0};
  set_conditions(conditions, remaining > 0, exact);
}

// Puts every sample at its start; one block per sample.
template <typename T>
__global__ void __launch_bounds__(kLoopThreads) start_kernel(const LoopTask<T> task) {
  const int64_t sample = blockIdx.x, row = sample * task.size;
  for (int64_t j = threadIdx.x; j < task.size; j += blockDim.x) {
    task.point[row + j] = task.best[row + j] = task.start == nullptr ? T(0) : task.start[row + j];
  }
  if (threadIdx.x != 0) return;
  const Sample<T> fresh = fresh_sample<T>(task.options);
  task.samples[sample] = fresh;
  task.orders[sample] = {kExact, 0, steps_in_place(task.options, fresh), 0, 0, fresh.omega};
  if (sample == 0) *task.control = {0, int32_t(task.batch), 1, 0, 0};
}

// What a graph begins with: whether anything is left to do.
template <typename T>
__global__ void enter_kernel(const LoopTask<T> task) {
  set_conditions(task.conditions, task.control->running > 0, task.control->exact != 0);
}

// phi'(W z + c) at the results, 0 where there is none; one block per sample.
template <typename T>
__global__ void __launch_bounds__(kLoopThreads)
    slope_kernel(const LoopTask<T> task, const T* product, T* value_slope) {
  const int64_t sample = blockIdx.x, row = sample * task.size;
  const bool none = task.status[sample] == int8_t(Status::kNonfinite);
  for (int64_t j = threadIdx.x; j < task.size; j += blockDim.x) {
    const T pre = product[row + j] + task.offset[row + j];
    value_slope[row + j] = none ? T(0) : activation_slope(task.activation, pre);
  }
}

}  // namespace cuda
}  // namespace fastdeq
