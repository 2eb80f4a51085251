// A step of restarted GMRES on the CPU: Arnoldi column, residual estimate, next point, per sample.
//
//   basis (B, m+1, n)   hessenberg (B, m+1, m), null (B, m+1), beta (B,) float64   step (B,) int64
//
// Samples go to threads. Per sample with k columns: classical Gram-Schmidt with a second projection
// in three passes over w and the k vectors: products; subtraction and the second products; the
// second subtraction. The passes go through n in blocks that stay in the first-level cache, so the
// last two read memory once. 8 k n operations; sums in float64. At the end of a cycle the least
// squares by rotations, m^2, and one more pass. Specification: fastdeq/solvers/gmres.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/dot.h"
#include "cpu/threads.h"

namespace fastdeq {
namespace {

constexpr int64_t kBlock = 512;  // entries of each vector at a time

// One sample's share of the state and of the step.
template <typename scalar_t>
struct Sample {
  scalar_t* basis;
  double* hessenberg;
  double* null;
  double& beta;
  int64_t& step;
  scalar_t* start;
  const scalar_t* offset;
  const scalar_t* point;
  const scalar_t* value;
  scalar_t* following;
  double scale;
  double norm;
  int64_t n;
  int64_t restart;

  void open() {
    const scalar_t length = norm > 0 ? scalar_t(norm) : scalar_t(1);
    for (int64_t i = 0; i < n; ++i) basis[i] = (value[i] - point[i]) / length;
    std::fill_n(hessenberg, (restart + 1) * restart, 0.0);
    std::fill_n(null, restart + 1, 0.0);
    null[0] = 1;
    beta = norm;
    std::copy_n(point, n, start);
    step = 0;
  }

  // Subtracts the columns from w; returns what is left of its inner products with them.
  void project(scalar_t* w, const double* from, double* left, int64_t columns) {
    for (int64_t j = 0; j < n; j += kBlock) {
      const int64_t count = std::min(kBlock, n - j);
      for (int64_t k = 0; k < columns; ++k) {
        const scalar_t weight = scalar_t(from[k]);
        const scalar_t* v = basis + k * n + j;
        for (int64_t i = 0; i < count; ++i) w[j + i] -= weight * v[i];
      }
      if (!left) continue;
      for (int64_t k = 0; k < columns; ++k) left[k] += dot(w + j, basis + k * n + j, count);
    }
  }

  void extend(double* work) {
    const int64_t columns = step + 1;
    double *first = work, *second = work + columns;
    std::fill_n(work, 2 * columns, 0.0);
    scalar_t* w = basis + columns * n;  // where it is to be
    const scalar_t over = scalar_t(scale);
    for (int64_t j = 0; j < n; j += kBlock) {
      const int64_t count = std::min(kBlock, n - j);
      for (int64_t i = j; i < j + count; ++i) w[i] = (point[i] - (value[i] - offset[i])) / over;
      for (int64_t k = 0; k < columns; ++k) first[k] += dot(w + j, basis + k * n + j, count);
    }
    project(w, first, second, columns);
    project(w, second, nullptr, columns);  // twice: orthogonal to machine precision
    double column_square = 0, inner = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const double entry = first[k] + second[k];
      hessenberg[k * restart + step] = entry;
      column_square += entry * entry;
      inner += null[k] * entry;
    }
    const double length = std::sqrt(dot(w, w, n));
    // A length at the rounding floor is an invariant subspace: the iterate is exact.
    const double floor = 10.0 * std::numeric_limits<scalar_t>::epsilon() * std::sqrt(column_square);
    const bool closed = length <= floor;
    hessenberg[columns * restart + step] = closed ? 0 : length;
    null[columns] = closed ? std::numeric_limits<double>::infinity() : -inner / length;
    const scalar_t by = scalar_t(length);
    for (int64_t i = 0; i < n; ++i) w[i] = closed ? scalar_t(0) : w[i] / by;
    step = columns;
  }

  // following = u_0 + V y, y the least squares of the columns so far: H = Q R by rotations.
  void minimise(double* work) {
    const int64_t columns = step;
    double* rhs = work;
    std::fill_n(rhs, columns + 1, 0.0);
    rhs[0] = beta;
    double largest = 0;
    for (int64_t k = 0; k < columns; ++k) {
      double* upper = hessenberg + k * restart;
      double* lower = upper + restart;
      const double radius = std::hypot(upper[k], lower[k]);
      const double cosine = radius > 0 ? upper[k] / radius : 1;
      const double sine = radius > 0 ? lower[k] / radius : 0;
      for (int64_t j = k; j < columns; ++j) {
        const double a = upper[j], b = lower[j];
        upper[j] = cosine * a + sine * b;
        lower[j] = cosine * b - sine * a;
      }
      rhs[k + 1] = -sine * rhs[k];
      rhs[k] *= cosine;
      largest = std::max(largest, std::abs(upper[k]));
    }
    for (int64_t k = columns - 1; k >= 0; --k) {
      const double* row = hessenberg + k * restart;
      const bool singular = std::abs(row[k]) <= 1e-14 * largest;
      double sum = singular ? 0 : rhs[k];
      for (int64_t j = k + 1; j < columns; ++j) sum -= row[j] * rhs[j];
      rhs[k] = singular ? sum : sum / row[k];
    }
    std::copy_n(start, n, following);
    for (int64_t j = 0; j < n; j += kBlock) {
      const int64_t count = std::min(kBlock, n - j);
      for (int64_t k = 0; k < columns; ++k) {
        const scalar_t weight = scalar_t(rhs[k]);
        const scalar_t* v = basis + k * n + j;
        for (int64_t i = 0; i < count; ++i) following[j + i] += weight * v[i];
      }
    }
    step = -1;
  }

  // Whether the next point is an iterate.
  bool advance(double tol, double atol, bool last, double* work) {
    const bool opening = step < 0;
    if (opening) {
      open();
    } else {
      extend(work);
    }
    // |u_0|, or |b| in the first cycle, stands in for |f(u)|.
    const double size = std::sqrt(dot(start, start, n));
    double goal = atol + tol * (size > 0 ? size : scale);
    if (beta <= goal) goal = 0.1 * beta;
    double null_square = 0;
    for (int64_t k = 0; k <= step; ++k) null_square += null[k] * null[k];
    const double estimate = beta / std::sqrt(null_square);
    const bool leaving = !opening && (!(estimate > goal) || step >= restart || last);
    if (leaving) {
      minimise(work);
    } else if (opening && last) {
      std::copy_n(value, n, following);
    } else {
      const scalar_t* direction = basis + step * n;
      for (int64_t i = 0; i < n; ++i) following[i] = direction[i] * scalar_t(scale);
    }
    return leaving || last;
  }
};

std::tuple<at::Tensor, at::Tensor> gmres_step(at::Tensor& basis, at::Tensor& hessenberg,
                                              at::Tensor& null, at::Tensor& beta, at::Tensor& step,
                                              at::Tensor& start, const at::Tensor& offset,
                                              const at::Tensor& scale, const at::Tensor& point,
                                              const at::Tensor& value, const at::Tensor& norm,
                                              const at::Tensor& running, int64_t /*used*/,
                                              double tol, double atol, bool last) {
  TORCH_CHECK(basis.dim() == 3, "gmres_step: basis must be (B, m+1, n), got ", basis.sizes());
  const int64_t batch = basis.size(0), restart = basis.size(1) - 1, n = basis.size(2);
  const auto is = [](const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
    return t.sizes() == sizes && t.scalar_type() == dtype;
  };
  const at::ScalarType dtype = basis.scalar_type();
  TORCH_CHECK(restart >= 1 && is(hessenberg, {batch, restart + 1, restart}, at::kDouble) &&
                  is(null, {batch, restart + 1}, at::kDouble) && is(beta, {batch}, at::kDouble) &&
                  is(step, {batch}, at::kLong) && is(start, {batch, n}, dtype) &&
                  is(offset, {batch, n}, dtype) && is(scale, {batch}, dtype) &&
                  is(point, {batch, n}, dtype) && is(value, {batch, n}, dtype) &&
                  is(norm, {batch}, dtype) && is(running, {batch}, at::kBool),
              "gmres_step: shapes or dtypes do not fit those of basis ", basis.sizes());
  for (const at::Tensor* written : {&basis, &hessenberg, &null, &beta, &step, &start}) {
    TORCH_CHECK(written->is_contiguous(), "gmres_step: what is written to must be contiguous");
  }
  const at::Tensor b = offset.contiguous(), u = point.contiguous(), f = value.contiguous();
  const at::Tensor scales = scale.contiguous(), norms = norm.contiguous();
  const at::Tensor goes_on = running.contiguous();
  at::Tensor following = at::empty({batch, n}, basis.options());
  at::Tensor iterate = at::empty({batch}, running.options());

  AT_DISPATCH_FLOATING_TYPES(dtype, "gmres_step", [&] {
    scalar_t* basis_data = basis.mutable_data_ptr<scalar_t>();
    scalar_t* start_data = start.mutable_data_ptr<scalar_t>();
    scalar_t* following_data = following.mutable_data_ptr<scalar_t>();
    double* hessenberg_data = hessenberg.mutable_data_ptr<double>();
    double* null_data = null.mutable_data_ptr<double>();
    double* beta_data = beta.mutable_data_ptr<double>();
    int64_t* step_data = step.mutable_data_ptr<int64_t>();
    bool* iterate_data = iterate.mutable_data_ptr<bool>();
    const scalar_t* offset_data = b.const_data_ptr<scalar_t>();
    const scalar_t* point_data = u.const_data_ptr<scalar_t>();
    const scalar_t* value_data = f.const_data_ptr<scalar_t>();
    const scalar_t* scale_data = scales.const_data_ptr<scalar_t>();
    const scalar_t* norm_data = norms.const_data_ptr<scalar_t>();
    const bool* running_data = goes_on.const_data_ptr<bool>();

    // A share of work below some 30 microseconds is not worth another thread.
    const int64_t entries = std::max<int64_t>(1, (restart + 1) * n);
    const int64_t grain = std::max<int64_t>(1, 262144 / entries);
    Sharing& sharing = sharing_of(Shared::kMixing, double(batch * entries));
    parallel_for(batch, grain, sharing, [&](int64_t begin, int64_t end) {
      std::vector<double> work(2 * (restart + 1));
      for (int64_t i = begin; i < end; ++i) {
        if (!running_data[i]) {
          std::copy_n(point_data + i * n, n, following_data + i * n);
          iterate_data[i] = last;
          continue;
        }
        Sample<scalar_t> sample{basis_data + i * (restart + 1) * n,
                                hessenberg_data + i * (restart + 1) * restart,
                                null_data + i * (restart + 1),
                                beta_data[i],
                                step_data[i],
                                start_data + i * n,
                                offset_data + i * n,
                                point_data + i * n,
                                value_data + i * n,
                                following_data + i * n,
                                double(scale_data[i]),
                                double(norm_data[i]),
                                n,
                                restart};
        iterate_data[i] = sample.advance(tol, atol, last, work.data());
      }
    });
  });
  return {following, iterate};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CPU, m) { m.impl("gmres_step", &gmres_step); }

}  // namespace fastdeq
