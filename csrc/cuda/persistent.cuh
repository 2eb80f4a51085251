// The persistent solver: a whole solve of an affine cell in one cooperative launch, with W on chip.
//
//   forward  z = phi(W z + c)        adjoint  q = D (g + q W)
//   plain and damped steps, heavy ball, Anderson acceleration; float (true IEEE) and double
//
// The grid is groups x members. Member j of a group keeps the rows of W for tile_columns outputs in
// shared memory from the first iteration to the last; the group takes one tile of tile_rows samples
// after another. Per iteration each member
//   1. streams the points of the tile through shared memory and computes its part of the product,
//   2. makes its part of the value phi(W z + c) and of the sums |f - z|^2, |f|^2 and, for Anderson,
//      <g_k, g_j> (in double); it writes the sums and, on trust, the next plain, damped or
//      heavy-ball point of its columns,
//   3. waits for the group: the one barrier of an iteration,
//   4. adds up the members' sums in one order and judges every sample, as all members do, with the
//      same outcome to the last bit, so that no decision is sent around.
// Only where a sample mixes its history or goes back to a trusted value, the next points are
// written in step 4, and a second barrier follows. Nothing depends on the order in which threads
// run.
//
// Two buffers of points are exchanged through the second-level cache by __stcg and copy_async:
// between two barriers one is read by all and the other written, each column by one member. A
// member can be one barrier ahead of another, not two, so two are enough; the same holds for the
// sums. The best iterate, last changes, history and Gram matrix are a member's own, where no other
// block reads or writes.
//
// Per iteration and block: tile_rows d s bytes (s an entry's) of points read for tile_rows
// tile_columns d multiply-adds; about 4 tile_rows tile_columns s in the epilogue, (4 + 2 count)
// more with Anderson; members tile_rows 8 (2 or 3 + count) bytes of sums. W is read once for each
// group. phi' at the end is one more product for the tile: keeping W best + c along instead would
// cost three more accesses to memory per element and iteration.
//
// Compared with the reference solves and float64 on tests/cuda_emulator; compiled for sm_80 and
// sm_90. Tile sizes and the plan are choices, not measurements.

#pragma once

#include "cuda/activations.cuh"
#include "cuda/persistent_history.cuh"

namespace fastdeq {
namespace cuda {

template <typename T, int kRows, int kColumns>
class Member : MemberHistory<T, kRows, kColumns> {
 public:
  __device__ explicit Member(const PersistentTask<T>& task)
      : Places(task),
        barrier_(reinterpret_cast<unsigned*>(task.barriers + group_ * kCounterStride),
                 task.members) {}

  __device__ void run() {
    product_.load_weight(first_output_);
    if (member_ == task_.members - 1) {  // the ends of point rows, which nobody else writes
      for (int m = threadIdx.x; m < 2 * tile_rows(); m += blockDim.x) {
        for (int k = task_.size; k < row_entries_; ++k)
          __stcg(points_ + m * row_entries_ + k, T(0));
      }
    }
    for (int tile = group_; tile < task_.tiles; tile += task_.groups) {
      begin(tile);
      bool at_zero = task_.start == nullptr;  // where the product is known
      for (bool going = true; going; at_zero = false) {
        if (!at_zero) multiply();
        evaluate(at_zero);
        barrier_.wait();
        going = advance(at_zero);
        parity_ ^= 1;
        entry_ = entry_ + 1 == entries() ? 0 : entry_ + 1;
      }
      finish();
    }
  }

 private:
  using Places = MemberHistory<T, kRows, kColumns>;
  using Places::area, Places::at, Places::extend_gram, Places::f, Places::g, Places::gram,
      Places::mix, Places::mixes, Places::multiply;
  using Places::columns_, Places::first_output_, Places::first_sample_, Places::group_;
  using Places::lane_, Places::last_, Places::member_, Places::parity_, Places::points_;
  using Places::older, Places::own, Places::partial_sum, Places::point, Places::entries;
  using Places::product_, Places::row_entries_, Places::rows_, Places::samples_, Places::entry_;
  using Places::task_, Places::warp_;
  using Places::tile_rows, Places::warps;

  __device__ void begin(int tile) {
    first_sample_ = int64_t(tile) * tile_rows();
    const int64_t left = task_.batch - first_sample_;
    rows_ = left < tile_rows() ? int(left) : tile_rows();
    entry_ = 0;
    for (int m = threadIdx.x; m < tile_rows(); m += blockDim.x) {
      reset(samples_[m].sample, task_.options);
      samples_[m].active = m < rows_;
      samples_[m].improved = false;
    }
    for (int m = warp_; m < rows_; m += warps()) {
      for (int n = lane_; n < columns_; n += kWarpLanes) {
        const T start = task_.start != nullptr ? task_.start[at(m, n)] : T(0);
        task_.value[at(m, n)] = start;
        if (task_.start != nullptr) __stcg(point(parity_ ^ 1, m, n), start);
      }
    }
    if (task_.start != nullptr) {
      barrier_.wait();
      parity_ ^= 1;
    } else {
      __syncthreads();
    }
  }

  // Step 2. The point before this one is in the buffer that the next one goes to: where it was the
  // best so far, it is saved first.
  __device__ void evaluate(bool at_zero) {
    for (int first = warp_; first < rows_; first += kTogether * warps()) {
      bool active[kTogether];
      // |f - z|^2 of each row, |f|^2 of each row; squares may leave the range of float.
      double squares[2 * kTogether] = {};
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int m = first + r * warps();
        active[r] = m < rows_ && samples_[m].active;
      }
      for (int n = lane_; n < columns_; n += kWarpLanes) {
        evaluate_column(at_zero, first, n, active, squares);
      }
      const double total = warp_sums<2 * kTogether>(squares, lane_);
      const int index = sum_of_lane<2 * kTogether>(lane_);
      const int m = first + index % kTogether * warps();
      if (lane_ < 2 * kTogether && m < rows_) {
        __stcg(partial_sum(member_, index / kTogether, m), total);
      }
    }
    if (task_.options.window > 0) {
      for (int first = warp_; first < rows_; first += kGramRows * warps()) extend_gram(first);
    }
  }

  __device__ void evaluate_column(bool at_zero, int first, int n, const bool (&active)[kTogether],
                                  double (&squares)[2 * kTogether]) {
    const SolveOptions& o = task_.options;
    const bool momentum = o.begins_with_momentum();
    T pre[kTogether] = {}, slope[kTogether] = {}, z[kTogether] = {}, last[kTogether] = {};
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int m = first + r * warps();
      if (!active[r]) continue;
      pre[r] = task_.injection[at(m, n)];
      if (task_.slope != nullptr) slope[r] = task_.slope[at(m, n)];
      if (!at_zero) z[r] = __ldcg(point(parity_, m, n));
      if (momentum) last[r] = own(last_, m, n);
      if (samples_[m].improved) task_.value[at(m, n)] = __ldcg(point(parity_ ^ 1, m, n));
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int m = first + r * warps();
      if (!active[r]) continue;
      if (!at_zero) pre[r] += product_.result(m, n);
      const T value =
          task_.slope != nullptr ? slope[r] * pre[r] : activate(task_.activation, pre[r]);
      const T difference = value - z[r];
      squares[r] += double(difference) * double(difference);
      squares[kTogether + r] += double(value) * double(value);
      T next = value;
      if (momentum) {
        const T omega = T(samples_[m].sample.omega);
        T change = omega * difference;
        if (omega != T(1)) change += (omega - T(1)) * last[r];
        own(last_, m, n) = change;
        next = z[r] + change;
      } else if (o.damping != 1) {
        next = z[r] + T(o.damping) * difference;
      }
      __stcg(point(parity_ ^ 1, m, n), next);
      if (o.window > 0) {
        f(entry_, m, n) = value;
        g(entry_, m, n) = difference;
      }
    }
  }

  // Step 4. False when all samples of the tile have stopped.
  __device__ bool advance(bool at_zero) {
    double* const totals = area();
    for (int i = threadIdx.x; i < task_.sums * tile_rows(); i += blockDim.x) {
      const int sum = i / tile_rows(), m = i % tile_rows();
      if (!samples_[m].active || sum > 2 + samples_[m].sample.count) continue;
      double total = 0;
#pragma unroll 8
      for (int member = 0; member < task_.members; ++member) {
        total += __ldcg(partial_sum(member, sum, m));
      }
      totals[i] = total;
    }
    __syncthreads();
    bool going = false, mixing = false, moving = false;
    for (int m = threadIdx.x; m < rows_; m += blockDim.x) {
      judge_sample(m, totals + m);
      samples_[m].improved &= !at_zero;  // zero is the best already
      const Decision& d = samples_[m].decision;
      going |= !d.stop;
      mixing |= mixes(d);
      moving |= !d.stop && (mixes(d) || d.step == Step::kTakeBack);
    }
    going = __syncthreads_or(going);
    mixing = __syncthreads_or(mixing);
    moving = __syncthreads_or(moving);
    for (int m = warp_; m < rows_; m += warps()) {
      const bool last = samples_[m].improved && samples_[m].decision.stop;
      const bool back = samples_[m].decision.step == Step::kTakeBack;
      for (int n = lane_; (last || back) && n < columns_; n += kWarpLanes) {
        if (last) task_.value[at(m, n)] = __ldcg(point(parity_, m, n));
        if (back) __stcg(point(parity_ ^ 1, m, n), f(older(1), m, n));
      }
    }
    if (mixing) mix();
    if (moving) barrier_.wait();
    return going;
  }

  // By one thread for each sample; `totals` are tile_rows apart.
  __device__ void judge_sample(int m, const double* totals) {
    TileSample& s = samples_[m];
    Decision d;
    d.stop = true;
    if (s.active) {
      const double norm = sqrt(totals[0]), size = sqrt(totals[tile_rows()]);
      const double relative = double(T(relative_residual(task_.options, norm, size)));
      Sample sample = s.sample;
      d = judge(sample, task_.options, norm, relative);
      s.sample = sample;
      s.active = !d.stop;
      s.status = d.status;
      const bool remembers = d.step == Step::kMix || d.step == Step::kRefill;
      for (int age = 0; remembers && age <= d.count; ++age) {
        const double inner = totals[(2 + age) * tile_rows()];
        gram(m)[entry_ * entries() + older(age)] = gram(m)[older(age) * entries() + entry_] = inner;
      }
    }
    s.improved = d.improved;
    s.decision = d;
  }

  __device__ void finish() {
    const int counters = counters_of(task_.options.solver);
    for (int m = threadIdx.x; m < rows_; m += blockDim.x) {
      if (member_ == 0) {
        const Sample& s = samples_[m].sample;
        task_.status[first_sample_ + m] = int8_t(samples_[m].status);
        task_.iterations[first_sample_ + m] = s.iterations;
        task_.residual[first_sample_ + m] = T(s.best_residual);
        for (int i = 0; i < counters; ++i) {
          task_.rejects[(first_sample_ + m) * counters + i] = s.rejects[i];
        }
      }
      samples_[m].active = true;  // for one more product
    }
    if (task_.value_slope != nullptr) write_slope();
    __syncthreads();  // the samples are read until here
  }

  __device__ void write_slope() {
    for (int m = warp_; m < rows_; m += warps()) {
      for (int n = lane_; n < columns_; n += kWarpLanes) {
        __stcg(point(parity_ ^ 1, m, n), task_.value[at(m, n)]);
      }
    }
    barrier_.wait();
    parity_ ^= 1;
    multiply();
    for (int m = warp_; m < rows_; m += warps()) {
      const bool failed = samples_[m].status == Status::kNonfinite;
      for (int n = lane_; n < columns_; n += kWarpLanes) {
        const T pre = task_.injection[at(m, n)] + product_.result(m, n);
        task_.value_slope[at(m, n)] = failed ? T(0) : activation_slope(task_.activation, pre);
      }
    }
  }

  GroupBarrier barrier_;
};

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(kPersistentWarps* kWarpLanes, 1)
    persistent_solve(const __grid_constant__ PersistentTask<T> task) {
  Member<T, kRows, kColumns>(task).run();
}

}  // namespace cuda
}  // namespace fastdeq
