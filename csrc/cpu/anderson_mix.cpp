// Anderson mix on the CPU: one row of the Gram matrix, the small solve, the mixing, per sample.
//
//   f_history, g_history (B, m, n)   gram (B, m, m) float64   count (B,) int32
//
// Samples go to threads. Per sample: one pass over g (m n reads, 2 m n operations) for the row, and
// one over f (m n reads, 3 m n operations; over g again where damping < 1) for the mixing, so
// memory traffic sets the time. Inner products are accumulated in float64: the differences of the
// Gram matrix cancel. Specification: fastdeq/ops/anderson_mix.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "common/anderson.h"
#include "cpu/dot.h"
#include "cpu/threads.h"

namespace fastdeq {
namespace {

// Cheap checks: strides are free, values are not looked at.
void check_anderson_mix(const at::Tensor& f_history, const at::Tensor& g_history,
                        const at::Tensor& gram, const at::Tensor& count, int64_t newest) {
  TORCH_CHECK(f_history.dim() == 3 && f_history.sizes() == g_history.sizes(),
              "anderson_mix: f_history and g_history must both be (B, m, n), got ",
              f_history.sizes(), " and ", g_history.sizes());
  const int64_t batch = f_history.size(0), entries = f_history.size(1);
  TORCH_CHECK(gram.sizes() == at::IntArrayRef({batch, entries, entries}) &&
                  gram.scalar_type() == at::kDouble,
              "anderson_mix: gram must be float64 (", batch, ", ", entries, ", ", entries,
              "), got ", gram.scalar_type(), " ", gram.sizes());
  TORCH_CHECK(count.sizes() == at::IntArrayRef({batch}) && count.scalar_type() == at::kInt,
              "anderson_mix: count must be int32 (", batch, ",), got ", count.scalar_type(), " ",
              count.sizes());
  TORCH_CHECK(f_history.scalar_type() == g_history.scalar_type(),
              "anderson_mix: f_history and g_history differ in dtype");
  TORCH_CHECK(f_history.scalar_type() == at::kFloat || f_history.scalar_type() == at::kDouble,
              "anderson_mix: the history must be float32 or float64, got ",
              f_history.scalar_type());
  TORCH_CHECK(f_history.device() == g_history.device() && f_history.device() == gram.device() &&
                  f_history.device() == count.device(),
              "anderson_mix: the tensors are on different devices");
  TORCH_CHECK(newest >= 0 && newest < entries, "anderson_mix: newest ", newest, " is not in [0, ",
              entries, ")");
}

template <typename scalar_t>
void mix_sample(const scalar_t* f, const scalar_t* g, int64_t entries, int64_t newest, int64_t n,
                const double* gamma, double damping, scalar_t* z) {
  const scalar_t* f_new = f + newest * n;
  const scalar_t* g_new = g + newest * n;
  const scalar_t undamped = scalar_t(1 - damping);
  for (int64_t i = 0; i < n; ++i) z[i] = f_new[i] - undamped * g_new[i];
  for (int64_t age = 1; age < entries; ++age) {
    const scalar_t weight = scalar_t(gamma[age - 1]);
    if (weight == 0) continue;  // an unused entry may hold anything
    const scalar_t* f_old = f + entry_of(newest, age, entries) * n;
    const scalar_t* g_old = g + entry_of(newest, age, entries) * n;
    if (undamped == 0) {
      for (int64_t i = 0; i < n; ++i) z[i] -= weight * (f_new[i] - f_old[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        z[i] -= weight * (f_new[i] - f_old[i] - undamped * (g_new[i] - g_old[i]));
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> anderson_mix(
    const at::Tensor& f_history, const at::Tensor& g_history, at::Tensor& gram,
    const at::Tensor& count, int64_t newest, double damping, double regularization,
    double rank_tolerance, double max_weight) {
  check_anderson_mix(f_history, g_history, gram, count, newest);
  const at::Tensor f = f_history.contiguous(), g = g_history.contiguous();
  const at::Tensor valid = count.contiguous();
  const int64_t batch = f.size(0), entries = f.size(1), n = f.size(2);
  at::Tensor z = at::empty({batch, n}, f.options());
  at::Tensor dropped = at::empty({batch}, count.options());
  at::Tensor rejected = at::empty({batch}, count.options().dtype(at::kBool));
  const SolveOptions options{
      .regularization = regularization, .rank_tolerance = rank_tolerance, .max_weight = max_weight};

  AT_DISPATCH_FLOATING_TYPES(f.scalar_type(), "anderson_mix", [&] {
    const scalar_t* f_data = f.const_data_ptr<scalar_t>();
    const scalar_t* g_data = g.const_data_ptr<scalar_t>();
    const int32_t* count_data = valid.const_data_ptr<int32_t>();
    scalar_t* z_data = z.mutable_data_ptr<scalar_t>();
    int32_t* dropped_data = dropped.mutable_data_ptr<int32_t>();
    bool* rejected_data = rejected.mutable_data_ptr<bool>();
    double* gram_data = gram.mutable_data_ptr<double>();
    const int64_t s0 = gram.stride(0), s1 = gram.stride(1), s2 = gram.stride(2);

    // A share of work below some 30 microseconds is not worth another thread.
    const int64_t grain = std::max<int64_t>(1, 262144 / std::max<int64_t>(1, entries * n));
    Sharing& sharing = sharing_of(Shared::kMixing, double(batch * entries * n));
    parallel_for(batch, grain, sharing, [&](int64_t begin, int64_t end) {
      std::vector<double> work(small_solve_doubles(entries - 1)), gamma(entries);
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* fb = f_data + b * entries * n;
        const scalar_t* gb = g_data + b * entries * n;
        double* gram_b = gram_data + b * s0;
        for (int64_t j = 0; j < entries; ++j) {
          const double inner = dot(gb + newest * n, gb + j * n, n);
          gram_b[newest * s1 + j * s2] = inner;
          gram_b[j * s1 + newest * s2] = inner;
        }
        const Gram gram_of_b{gram_b, s1, s2, int(entries), int(newest), count_data[b]};
        const AndersonOutcome outcome =
            solve_small(OneLane(), gram_of_b, options, work.data(), gamma.data());
        dropped_data[b] = outcome.dropped;
        rejected_data[b] = outcome.rejected;
        mix_sample(fb, gb, entries, newest, n, gamma.data(), damping, z_data + b * n);
      }
    });
  });
  return {z, dropped, rejected};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CPU, m) { m.impl("anderson_mix", &anderson_mix); }

}  // namespace fastdeq
