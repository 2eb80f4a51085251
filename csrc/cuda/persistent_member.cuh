// A member of a group in the persistent solver: where its part of everything is, and sums over a
// warp for several numbers at a time. What it does is in persistent.cuh.

#pragma once

#include "cuda/persistent_product.cuh"

namespace fastdeq {
namespace cuda {

// Rows that a warp has under way at a time, so that the latencies of their reads overlap.
constexpr int kTogether = 4;

// Sums of kCount numbers over the lanes of a warp, a power of two up to 32, in kCount - 1 +
// log2(32 / kCount) exchanges: half of the numbers go to the other half of the lanes, and so on.
// Returns, in each lane, the sum that `sum_of_lane` names. The order does not depend on timing.
template <int kCount, int kBit = 1, typename T>
__device__ __forceinline__ T warp_sums(T* numbers, int lane) {
  if constexpr (kBit == kWarpLanes) {
    return numbers[0];
  } else if constexpr (kCount == 1) {
    numbers[0] += __shfl_xor_sync(kAllLanes, numbers[0], kBit);
    return warp_sums<1, kBit * 2>(numbers, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane & kBit) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T kept = upper ? numbers[i + kHalf] : numbers[i];
      const T given = upper ? numbers[i] : numbers[i + kHalf];
      numbers[i] = kept + __shfl_xor_sync(kAllLanes, given, kBit);
    }
    return warp_sums<kHalf, kBit * 2>(numbers, lane);
  }
}

template <int kCount, int kBit = 1>
__device__ __forceinline__ int sum_of_lane(int lane) {
  if constexpr (kCount == 1) {
    return 0;
  } else {
    return ((lane & kBit) != 0 ? kCount / 2 : 0) + sum_of_lane<kCount / 2, kBit * 2>(lane);
  }
}

template <typename T, int kRows, int kColumns>
class MemberPlaces {
 protected:
  __device__ explicit MemberPlaces(const PersistentTask<T>& task)
      : task_(task),
        product_(task, shared_memory()),
        group_(blockIdx.x / task.members),
        member_(blockIdx.x % task.members),
        lane_(threadIdx.x % kWarpLanes),
        warp_(threadIdx.x / kWarpLanes),
        first_output_(member_ * product_.tile_columns()),
        row_entries_(task.row_units * Unit<T>::kEntries) {
    samples_ = reinterpret_cast<TileSample*>(product_.area() + task.area_bytes);
    const int left = task.size - first_output_;
    columns_ = left < product_.tile_columns() ? left : product_.tile_columns();
    points_ = task.points + int64_t(group_) * 2 * tile_rows() * row_entries_;
    const int64_t own = int64_t(tile_rows()) * product_.tile_columns();
    last_ = task.last + blockIdx.x * own;
    history_ = task.history + blockIdx.x * own * 2 * entries();
    gram_ = task.gram + int64_t(blockIdx.x) * tile_rows() * entries() * entries();
  }

  __device__ int tile_rows() const { return product_.tile_rows(); }
  __device__ int entries() const { return task_.options.window + 1; }
  __device__ int warps() const { return blockDim.x / kWarpLanes; }
  __device__ int older(int age) const { return int(entry_of(entry_, age, entries())); }

  // Row m of the tile, the member's column n: in the two buffers of points, in tensors (B, d), in
  // the member's own buffers.
  __device__ T* point(int parity, int m, int n) const {
    return points_ + (parity * tile_rows() + m) * row_entries_ + first_output_ + n;
  }
  __device__ int64_t at(int m, int n) const {
    return (first_sample_ + m) * task_.size + first_output_ + n;
  }
  __device__ T& own(T* buffer, int m, int n) const {
    return buffer[m * product_.tile_columns() + n];
  }
  __device__ T& f(int entry, int m, int n) const {
    return own(history_, entry * tile_rows() + m, n);
  }
  __device__ T& g(int entry, int m, int n) const { return f(entries() + entry, m, n); }
  __device__ double* gram(int m) const { return gram_ + int64_t(m) * entries() * entries(); }

  __device__ double* partial_sum(int member, int sum, int m) const {
    const int64_t turn = int64_t(group_) * 2 + parity_;
    return task_.partial_sums + ((turn * task_.members + member) * task_.sums + sum) * tile_rows() +
           m;
  }
  __device__ double* area() const { return reinterpret_cast<double*>(product_.area()); }

  __device__ void multiply() {
    product_.run(reinterpret_cast<const Unit<T>*>(point(parity_, 0, 0) - first_output_), samples_,
                 rows_);
  }

  const PersistentTask<T>& task_;
  Product<T, kRows, kColumns> product_;
  const int group_, member_, lane_, warp_;
  const int first_output_, row_entries_;  // the member's first column; entries of a point row
  int columns_;                           // the member's, within W
  TileSample* samples_;
  T* points_;
  T* last_;
  T* history_;
  double* gram_;
  // The tile being solved; which points and sums are read now; the entry of this evaluation.
  int64_t first_sample_ = 0;
  int rows_ = 0, parity_ = 0, entry_ = 0;
};

}  // namespace cuda
}  // namespace fastdeq
