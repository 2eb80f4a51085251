// Anderson mix on the GPU: a row of the Gram matrix, the small solve and the mixing in one launch.
//
//   f_history, g_history (B, m, n)   gram (B, m, m) float64   count (B,) int32
//   g = f(z) - z; k the newest of m slots; p = m - 1; s bytes per element; beta the damping
//   z = f_k - sum gamma_i (f_k - f_i) - (1 - beta) (g_k - sum gamma_i (g_k - g_i))
//
// One block per sample, of at most 256 threads, fewer where n is small.
//   1. Row: threads run over n, kTile slots at a time, so that g_k is read once per tile. The sums
//      are float64, because the differences of the Gram matrix cancel; warp shuffles add them up.
//   2. Solve: thread 0, by solve_small on a copy of the Gram matrix in shared memory. It packs the
//      slots of nonzero weight, so that step 3 reads no others.
//   3. Mixing: threads run over n; each element of z is written once.
// All reads along n are coalesced, one element to a thread. A history that is not contiguous is
// copied first.
//
// Bytes per sample: n s (m + ceil(m / kTile)) read for the row; at most 2 n s + p n s for the
// mixing (with beta < 1 another p n s, of g); n s written. Reading g again often hits a cache. The
// Gram matrix adds 8 m^2 read and 8 (2 m - 1) written. Operations: 2 m n in float64 for the row;
// 3 p n (6 p n with beta < 1) in the dtype of f for the mixing. The solve is about p^3 float64
// operations in one thread while its block waits: other blocks on the multiprocessor have to hide
// that, and for p in the tens it should be the longest step.
//
// Compared with fastdeq/reference.py, anderson_mix, by running this kernel's code on CPU threads;
// compiled for sm_80 and sm_90. No GPU has run it yet: kTile and the block size are choices, not
// measurements.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "anderson.h"
#include "anderson_check.h"
#include "launch.h"

namespace fastdeq {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kTile = 8;

// Shared memory is what limits m: 48 KiB are there without asking the driver for more.
constexpr int kMaxSlots = 54;
constexpr size_t kSharedLimit = 48 * 1024;

struct Arguments {
  const int32_t* count;
  double* gram;
  int32_t* dropped;
  bool* rejected;
  int64_t gram_batch, gram_row, gram_column;  // strides
  int64_t n;
  int32_t slots, slot;
  AndersonOptions options;
};

// The block's shared memory, carved from one allocation: doubles first, for their alignment.
template <typename scalar_t>
struct Shared {
  double* gram;      // m x m, contiguous
  double* work;      // p x m
  double* gamma;     // m
  double* partial;   // (kMaxThreads / kWarp) x kTile
  scalar_t* weight;  // m: nonzero weights, newest first
  int32_t* used;     // m: their slots
  int32_t* length;   // how many

  __host__ __device__ static size_t bytes(size_t m) {
    return sizeof(double) * (m * m + (m - 1) * m + m + kMaxThreads / kWarp * kTile) +
           sizeof(scalar_t) * m + sizeof(int32_t) * (m + 1);
  }

  __device__ Shared(double* base, int m)
      : gram(base),
        work(gram + m * m),
        gamma(work + (m - 1) * m),
        partial(gamma + m),
        weight(reinterpret_cast<scalar_t*>(partial + kMaxThreads / kWarp * kTile)),
        used(reinterpret_cast<int32_t*>(weight + m)),
        length(used + m) {}
};

__device__ inline double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;  // in lane 0
}

// <g_k, g_j> for all j, into row and column k of the Gram matrix and of its copy.
template <typename scalar_t>
__device__ void write_row(const scalar_t* __restrict__ g, const Arguments& a, double* gram,
                          const Shared<scalar_t>& shared) {
  const scalar_t* newest = g + a.slot * a.n;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int first = 0; first < a.slots; first += kTile) {
    double sum[kTile] = {};
    for (int64_t i = threadIdx.x; i < a.n; i += blockDim.x) {
      const double factor = newest[i];
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        if (first + t < a.slots) sum[t] += factor * double(g[(first + t) * a.n + i]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (first + t >= a.slots) continue;  // the same for the whole block
      const double total = warp_sum(sum[t]);
      if (lane == 0) shared.partial[warp * kTile + t] = total;
    }
    __syncthreads();
    const int j = first + threadIdx.x;
    if (threadIdx.x < kTile && j < a.slots) {
      double inner = 0;
      for (int w = 0; w < warps; ++w) inner += shared.partial[w * kTile + threadIdx.x];
      gram[a.slot * a.gram_row + j * a.gram_column] = inner;
      gram[j * a.gram_row + a.slot * a.gram_column] = inner;
      shared.gram[a.slot * a.slots + j] = inner;
      shared.gram[j * a.slots + a.slot] = inner;
    }
    __syncthreads();
  }
}

template <typename scalar_t, bool kDamped>
__global__ void __launch_bounds__(kMaxThreads)
    anderson_mix_kernel(const scalar_t* __restrict__ f_history,
                        const scalar_t* __restrict__ g_history, scalar_t* __restrict__ z,
                        const Arguments a) {
  extern __shared__ double shared_base[];
  const Shared<scalar_t> shared(shared_base, a.slots);
  const int64_t sample = blockIdx.x;
  const scalar_t* __restrict__ f = f_history + sample * a.slots * a.n;
  const scalar_t* __restrict__ g = g_history + sample * a.slots * a.n;
  double* gram = a.gram + sample * a.gram_batch;

  for (int e = threadIdx.x; e < a.slots * a.slots; e += blockDim.x) {
    shared.gram[e] = gram[e / a.slots * a.gram_row + e % a.slots * a.gram_column];
  }
  __syncthreads();  // before row and column `slot` of the copy are overwritten
  write_row(g, a, gram, shared);

  if (threadIdx.x == 0) {
    const AndersonOutcome outcome =
        solve_small(shared.gram, a.slots, 1, a.slots, a.slot, a.count[sample], a.options,
                    shared.work, shared.gamma);
    a.dropped[sample] = outcome.dropped;
    a.rejected[sample] = outcome.rejected;
    int length = 0;
    for (int age = 1; age < a.slots; ++age) {
      const scalar_t weight = scalar_t(shared.gamma[age - 1]);
      if (weight == 0) continue;  // an unused slot may hold anything
      shared.weight[length] = weight;
      shared.used[length++] = int32_t(slot_of(a.slot, age, a.slots));
    }
    *shared.length = length;
  }
  __syncthreads();

  const int length = *shared.length;
  const scalar_t undamped = scalar_t(1 - a.options.damping);
  for (int64_t i = threadIdx.x; i < a.n; i += blockDim.x) {
    const scalar_t f_new = f[a.slot * a.n + i], g_new = g[a.slot * a.n + i];
    // For beta = 1 as well: 0 * g_k carries a NaN or an infinity of g_k over to z.
    scalar_t mixed = f_new - undamped * g_new;
#pragma unroll 4
    for (int u = 0; u < length; ++u) {
      const int64_t old = shared.used[u] * a.n + i;
      scalar_t difference = f_new - f[old];
      if constexpr (kDamped) difference -= undamped * (g_new - g[old]);
      mixed -= shared.weight[u] * difference;
    }
    z[sample * a.n + i] = mixed;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> anderson_mix(
    const at::Tensor& f_history, const at::Tensor& g_history, at::Tensor& gram,
    const at::Tensor& count, int64_t slot, double damping, double regularization,
    double rank_tolerance, double max_weight) {
  check_anderson_mix(f_history, g_history, gram, count, slot);
  const int64_t batch = f_history.size(0), slots = f_history.size(1), n = f_history.size(2);
  TORCH_CHECK(slots <= kMaxSlots, "anderson_mix: the CUDA form takes at most ", kMaxSlots,
              " slots, got ", slots);
  const at::Tensor f = f_history.contiguous(), g = g_history.contiguous();
  const at::Tensor valid = count.contiguous();
  at::Tensor z = at::empty({batch, n}, f.options());
  at::Tensor dropped = at::empty({batch}, count.options());
  at::Tensor rejected = at::empty({batch}, count.options().dtype(at::kBool));
  if (batch == 0) return {z, dropped, rejected};  // an empty grid is an error

  const Arguments arguments{
      .count = valid.const_data_ptr<int32_t>(),
      .gram = gram.mutable_data_ptr<double>(),
      .dropped = dropped.mutable_data_ptr<int32_t>(),
      .rejected = rejected.mutable_data_ptr<bool>(),
      .gram_batch = gram.stride(0),
      .gram_row = gram.stride(1),
      .gram_column = gram.stride(2),
      .n = n,
      .slots = int32_t(slots),
      .slot = int32_t(slot),
      .options = {damping, regularization, rank_tolerance, max_weight},
  };
  const int64_t warps = std::clamp<int64_t>((n + kWarp - 1) / kWarp, 1, kMaxThreads / kWarp);
  const Launch launch(f);
  AT_DISPATCH_FLOATING_TYPES(f.scalar_type(), "anderson_mix", [&] {
    const auto kernel =
        damping == 1 ? anderson_mix_kernel<scalar_t, false> : anderson_mix_kernel<scalar_t, true>;
    const size_t bytes = Shared<scalar_t>::bytes(slots);
    TORCH_INTERNAL_ASSERT(bytes <= kSharedLimit);
    kernel<<<unsigned(batch), unsigned(warps) * kWarp, bytes, launch.stream>>>(
        f.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(), z.mutable_data_ptr<scalar_t>(),
        arguments);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {z, dropped, rejected};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CUDA, m) { m.impl("anderson_mix", &anderson_mix); }

}  // namespace fastdeq
