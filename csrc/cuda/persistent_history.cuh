// The history of a member in the persistent solver, for Anderson acceleration: its part of the Gram
// matrix, the small solves, and the mixing of its columns.
//
// An evaluation k is in entry k mod (window + 1) of f and g. A row of the Gram matrix is summed in
// double from the sums of the members, because its differences cancel; every member has all of it.
// Reads per element and mixing: 2 and one for each difference, twice that with damping.

#pragma once

#include "cuda/persistent_member.cuh"

namespace fastdeq {
namespace cuda {

constexpr int kGramRows = 2, kGramAges = 8;  // products that a warp adds up at a time

template <typename T, int kRows, int kColumns>
class MemberHistory : protected MemberPlaces<T, kRows, kColumns> {
 protected:
  using Places = MemberPlaces<T, kRows, kColumns>;
  using Places::area, Places::f, Places::g, Places::gram, Places::older, Places::partial_sum;
  using Places::columns_, Places::lane_, Places::member_, Places::parity_, Places::rows_;
  using Places::Places, Places::warp_, Places::warps;
  using Places::point, Places::samples_, Places::entry_, Places::entries, Places::task_;

  // Evaluations in the history of a sample; -1 where it is not evaluated.
  __device__ int history_of(int m) const {
    return m < rows_ && samples_[m].active ? samples_[m].sample.count : -1;
  }

  // <g_k, g_j> of the member's columns, for the evaluations in the history of each sample.
  __device__ void extend_gram(int first) {
    int count[kGramRows], most = -1;
#pragma unroll
    for (int r = 0; r < kGramRows; ++r) {
      const int m = first + r * warps();
      count[r] = history_of(m);
      most = count[r] > most ? count[r] : most;
    }
    for (int begin = 0; begin <= most; begin += kGramAges) {
      double inner[kGramRows * kGramAges] = {};
      for (int n = lane_; n < columns_; n += kWarpLanes) {
#pragma unroll
        for (int i = 0; i < kGramRows * kGramAges; ++i) {
          const int m = first + i / kGramAges * warps(), age = begin + i % kGramAges;
          if (age > count[i / kGramAges]) continue;
          inner[i] += double(g(entry_, m, n)) * double(g(older(age), m, n));
        }
      }
      const double total = warp_sums<kGramRows * kGramAges>(inner, lane_);
      const int index = sum_of_lane<kGramRows * kGramAges>(lane_);
      const int m = first + index / kGramAges * warps(), age = begin + index % kGramAges;
      if (lane_ < kGramRows * kGramAges && age <= history_of(m)) {
        __stcg(partial_sum(member_, 2 + age, m), total);
      }
    }
  }

  // With an empty history the mixed point is the damped one, which is written already.
  __device__ static bool mixes(const Decision& d) { return d.step == Step::kMix && d.count > 0; }

  // As many samples at a time as there is room for: their small solves, one to a warp, then their
  // next points.
  __device__ void mix() {
    const int window = task_.options.window, stride = small_bytes(window) / 8;
    const int limit = int(task_.area_bytes / small_bytes(window));
    double* const gamma = area() + small_solve_doubles(window);
    for (int first = 0; first < rows_; first += limit) {
      const int end = first + limit < rows_ ? first + limit : rows_;
      for (int m = first + warp_; m < end; m += warps()) {
        if (!mixes(samples_[m].decision)) continue;
        const int place = (m - first) * stride;
        const Gram matrix{gram(m), entries(), 1, entries(), entry_, samples_[m].decision.count};
        const AndersonOutcome outcome =
            solve_small(WarpLanes(), matrix, task_.options, area() + place, gamma + place);
        if (lane_ == 0) take_in(samples_[m].sample, outcome);
      }  // a warp mixes the rows that it has solved for
      for (int row = first + warp_; row < end; row += kTogether * warps()) {
        mix_rows(row, end, gamma + (row - first) * stride, stride);
      }
      __syncthreads();
    }
  }

  // `gamma` is the first row's; those of the rows follow each other in steps of `stride`.
  __device__ void mix_rows(int first, int end, const double* gamma, int stride) {
    const T undamped = T(1 - task_.options.damping);
    int count[kTogether], most = 0;
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      const int m = first + r * warps();
      const bool moves = m < end && mixes(samples_[m].decision) && !samples_[m].decision.stop;
      count[r] = moves ? samples_[m].decision.count : 0;
      most = count[r] > most ? count[r] : most;
    }
    for (int n = lane_; n < columns_; n += kWarpLanes) {
      T z[kTogether], value[kTogether], residual[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        value[r] = residual[r] = T(0);
        if (count[r] == 0) continue;
        value[r] = f(entry_, first + r * warps(), n);
        residual[r] = g(entry_, first + r * warps(), n);
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) z[r] = value[r] - undamped * residual[r];
#pragma unroll 2
      for (int age = 1; age <= most; ++age) {
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
          const int m = first + r * warps();
          if (age > count[r]) continue;
          const T weight = T(gamma[r * warps() * stride + age - 1]);
          T difference = value[r] - f(older(age), m, n);
          if (undamped != T(0)) difference -= undamped * (residual[r] - g(older(age), m, n));
          z[r] -= weight == T(0) ? T(0) : weight * difference;
        }
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        if (count[r] > 0) __stcg(point(parity_ ^ 1, first + r * warps(), n), z[r]);
      }
    }
  }
};

}  // namespace cuda
}  // namespace fastdeq
