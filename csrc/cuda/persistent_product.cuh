// The product of the persistent solver: rows of points with the slice of W that a block keeps.
//
//   result(m, n) = sum_k W[first output + n, k] point[m, k],    m < tile_rows, n < tile_columns
//
// Layout. In shared memory, in units of 16 bytes (4 floats or 2 doubles along k): the slice, rows
// of `weight_units`, and two chunks of `chunk` units of all point rows, rows of chunk + 1. Both row
// lengths are odd numbers of units, so that 8 rows begin in 8 different groups of 4 banks. A warp
// is 4 x 8 threads, rows x columns: 8 lanes read 8 rows of W without a conflict and share one point
// row. A thread has kRows x kColumns outputs, 4 point rows or 8 outputs apart.
//
// Per unit and thread: kRows + kColumns reads of 16 bytes for kRows kColumns e multiply-adds, e = 4
// (float) or 2. In floats: 8 x 4 has 10.7 multiply-adds to a read, 4 x 4 has 8, 4 x 2 has 5.3, 1 x
// 4 has 3.2 and is for very small batches. Where a tile has fewer warp tiles than the block has
// warps, `splits` warps take parts of each chunk, and their sums are added in a fixed order.
//
// While a chunk is multiplied, the next one is copied from the second-level cache. Point rows of
// samples that have stopped are not copied, and their products are left to chance.

#pragma once

#include "cuda/device.cuh"
#include "cuda/persistent_plan.h"
#include "cuda/persistent_task.h"

namespace fastdeq {
namespace cuda {

template <typename T>
struct alignas(kUnitBytes) Unit {
  static constexpr int kEntries = kUnitBytes / int(sizeof(T));
  T entry[kEntries];
};

template <typename T, int kRows, int kColumns>
class Product {
 public:
  __device__ Product(const PersistentTask<T>& task, unsigned char* shared)
      : task_(task),
        tile_rows_(task.warps_m * kWarpRows * kRows),
        tile_columns_(task.warps_n * kWarpColumns * kColumns),
        weight_(reinterpret_cast<Unit<T>*>(shared)),
        chunks_(weight_ + tile_columns_ * task.weight_units) {
    const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
    split_ = warp % task.splits;
    const int place = warp / task.splits;
    row_ = place / task.warps_n * kWarpRows * kRows + lane / kWarpColumns;
    column_ = place % task.warps_n * kWarpColumns * kColumns + lane % kWarpColumns;
  }

  __device__ int tile_rows() const { return tile_rows_; }
  __device__ int tile_columns() const { return tile_columns_; }

  // What the chunks are in while there is no product: `area_bytes`, 16-byte aligned.
  __device__ unsigned char* area() const { return reinterpret_cast<unsigned char*>(chunks_); }

  // Zeros where the slice goes beyond W.
  __device__ void load_weight(int first_output) {
    const int entries = task_.weight_units * Unit<T>::kEntries, size = task_.size;
    T* const to = weight_->entry;
    const bool along_k = task_.input_stride == 1;  // neighbours in a warp read neighbours in W
    for (int i = threadIdx.x; i < tile_columns_ * entries; i += blockDim.x) {
      const int n = along_k ? i / entries : i % tile_columns_;
      const int k = along_k ? i % entries : i / tile_columns_;
      const int64_t output = first_output + n;
      to[n * entries + k] =
          output < size && k < size
              ? task_.weight[output * task_.output_stride + k * task_.input_stride]
              : T(0);
    }
  }

  // Of the first `rows` of `points`, those with an active sample. All threads; `result` is there
  // when it returns. Begins and ends with the block in step, which is the caller's part before.
  __device__ void run(const Unit<T>* points, const TileSample* samples, int rows) {
    T sum[kRows][kColumns] = {};
    bool active = false;
    for (int i = 0; i < kRows; ++i) active |= samples[row_ + kWarpRows * i].active;
    const bool busy = __ballot_sync(kAllLanes, active) != 0;

    fetch(points, samples, rows, 0, 0);
    int stage = 0;
    for (int first = 0; first < task_.row_units; first += chunk(), stage ^= 1) {
      wait_copies();
      __syncthreads();  // the chunk is there, and nobody reads the other one any more
      if (first + chunk() < task_.row_units) {
        fetch(points, samples, rows, first + chunk(), stage ^ 1);
      }
      if (busy) multiply(first, stage, sum);
    }
    __syncthreads();  // the sums take the place of the chunks
    T* const staged = this->staged() + (split_ * tile_rows_ + row_) * staged_stride() + column_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        staged[kWarpRows * i * staged_stride() + kWarpColumns * j] = sum[i][j];
      }
    }
    __syncthreads();
  }

  __device__ T result(int m, int n) const {
    const T* at = staged() + m * staged_stride() + n;
    T sum = *at;
    for (int s = 1; s < task_.splits; ++s) sum += at[s * tile_rows_ * staged_stride()];
    return sum;
  }

 private:
  __device__ int chunk() const { return 1 << task_.chunk_shift; }
  __device__ int staged_stride() const { return tile_columns_ + kStagePad; }
  __device__ T* staged() const { return chunks_->entry; }

  __device__ void fetch(const Unit<T>* points, const TileSample* samples, int rows, int first,
                        int stage) {
    const int left = task_.row_units - first;
    Unit<T>* const to = chunks_ + stage * tile_rows_ * (chunk() + 1);
    for (int i = threadIdx.x; i < rows << task_.chunk_shift; i += blockDim.x) {
      const int row = i >> task_.chunk_shift, unit = i & (chunk() - 1);
      if (unit < left && samples[row].active) {
        copy_async(to + row * (chunk() + 1) + unit,
                   points + int64_t(row) * task_.row_units + first + unit);
      }
    }
  }

  __device__ __forceinline__ void multiply(int first, int stage, T (&sum)[kRows][kColumns]) {
    const int left = task_.row_units - first, length = left < chunk() ? left : chunk();
    const int part = (length + task_.splits - 1) / task_.splits, begin = split_ * part;
    const int end = begin + part < length ? begin + part : length;
    const Unit<T>* const points = chunks_ + (stage * tile_rows_ + row_) * (chunk() + 1);
    const Unit<T>* const weight = weight_ + column_ * task_.weight_units + first;
#pragma unroll 2
    for (int u = begin; u < end; ++u) {
      Unit<T> a[kRows], b[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = points[kWarpRows * i * (chunk() + 1) + u];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) b[j] = weight[kWarpColumns * j * task_.weight_units + u];
#pragma unroll
      for (int e = 0; e < Unit<T>::kEntries; ++e) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sum[i][j] += a[i].entry[e] * b[j].entry[e];
        }
      }
    }
  }

  const PersistentTask<T>& task_;
  const int tile_rows_, tile_columns_;
  Unit<T>* const weight_;
  Unit<T>* const chunks_;
  int split_, row_, column_;  // the first output of the thread in the tile
};

}  // namespace cuda
}  // namespace fastdeq
