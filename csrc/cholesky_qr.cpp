// CholeskyQR2 in ATen operators, for any device: A = Q R with Q^T Q = I, R upper triangular,
// R_ii > 0. A (m, n), m >= n, float32 or float64.
//
//   a pass:  G = Y^T Y,  S^T S = G + shift I,  Y <- Y S^-1,  R <- S R    (first Y = A, R = I)
//   E = G - I before the last pass, eps the machine epsilon of the working precision
//
// It is products and triangular solves, and reads no number on the host: on a GPU nothing waits for
// the device, as the capture of a CUDA graph demands. Two passes leave |Q^T Q - I| of a few eps
// where |E| was well below 1 (Yamamoto et al., ETNA 44 (2015) 306): Y has a condition number of
// sqrt((1 + |E|) / (1 - |E|)) then, and a pass over Y is backward stable. That, and the success of
// each Cholesky factorisation, is what `ok` says. As G squares the condition number:
//
// Wide: float32 input is worked on in float64. The first pass leaves |E| of about eps cond(A)^2,
// with eps = 2e-16, so two passes are enough for condition numbers up to about 1e7.
//
// Not wide: the working precision is that of A, for GPUs slow at float64 and for float64 input.
// There G need not be positive definite, and shifted passes go first (Fukaya et al., SIAM J. Sci.
// Comput. 42 (2020) A477), two in float32, one in float64. A shift of 4 eps |A|_F^2 turns a
// condition number c into about 2 c sqrt(eps n) and was enough: with half of it some sums over 600
// and more rows were too inexact. The sums are made in parts, which also halves the error of the
// last pass.
//
// Seen on a CPU, sizes 1 to 1536, condition numbers 1 to 1e6 (to 1e7 up to 512 columns), singular
// values spread evenly, all large but one, all small but one: the largest |Q^T Q - I|_ij was 8.4e-8
// in the wide way, the rounding of Q, and 4.6e-7 in the other; in float64, up to condition
// 1e14, 5.8e-15. No case failed. A first-order correction of Q in place of the second Cholesky pass
// left 1e-6 at condition 1e6; one shifted pass in place of two failed there in float32.
//
// Operations, in products of n x n matrices (2 n^3) for m = n: 5/3 a pass (1 for G, 1/6, 1/2), and
// 1 for each product of R after the first pass.

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

namespace fastdeq {
namespace {

constexpr double kLargestDeviation = 0.25;  // of |E|_F
constexpr double kShift = 4;                // in units of eps |Y|_F^2
constexpr int64_t kParts = 8;

struct State {
  at::Tensor y, r, ok;
};

// Whether G is the identity but for a small E; false for NaN.
at::Tensor near_identity(const at::Tensor& gram) {
  at::Tensor deviation = gram.clone();
  deviation.diagonal().sub_(1);
  return at::linalg_vector_norm(deviation).lt(kLargestDeviation);
}

// Y^T Y, its sums in kParts parts: the rounding errors of the diagonal grow with their length.
at::Tensor gram_in_parts(const at::Tensor& y) {
  const int64_t length = y.size(0) / kParts, rest = y.size(0) - kParts * length;
  const at::Tensor parts = y.narrow(0, 0, kParts * length).reshape({kParts, length, y.size(1)});
  at::Tensor gram = at::bmm(parts.transpose(1, 2), parts).sum(0);
  if (rest == 0) return gram;
  const at::Tensor last = y.narrow(0, kParts * length, rest);
  return gram.add_(at::mm(last.t(), last));
}

// `shift` is in units of |Y|_F^2, the trace of G.
void pass(State& state, bool wider, double shift, bool last) {
  at::Tensor gram = wider ? at::mm(state.y.t(), state.y) : gram_in_parts(state.y);
  if (last) state.ok = at::logical_and(state.ok, near_identity(gram));
  if (shift > 0) {
    at::Tensor diagonal = gram.diagonal();
    diagonal.add_(diagonal.sum().mul_(shift));
  }
  const auto [factor, info] = at::linalg_cholesky_ex(gram, /*upper=*/true);
  state.ok = at::logical_and(state.ok, info.eq(0));
  state.y = at::linalg_solve_triangular(factor, state.y, /*upper=*/true, /*left=*/false);
  state.r = state.r.defined() ? at::mm(factor, state.r) : factor;
}

// With `check` the caller looks at `ok` before it uses the factors, without they are NaN throughout
// where it is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cholesky_qr2(const at::Tensor& a, bool check,
                                                            bool wide) {
  TORCH_CHECK_VALUE(a.dim() == 2 && a.size(0) >= a.size(1),
                    "cholesky_qr2 needs a matrix (m, n) with m >= n, got ", a.sizes());
  const auto dtype = a.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "cholesky_qr2 needs float32 or float64, got ", dtype);
  at::AutoDispatchBelowAutograd no_grad;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::NoTF32Guard no_tf32;
  const int64_t m = a.size(0), n = a.size(1);
  State state{.y = a, .r = {}, .ok = at::ones({}, a.options().dtype(at::kBool))};
  if (n == 0) return {at::empty({m, n}, a.options()), at::empty({n, n}, a.options()), state.ok};

  at::Tensor largest;
  const bool wider = wide && dtype == at::kFloat;
  if (wider) {
    state.y = a.to(at::kDouble);  // no square of a float32 leaves the range of float64
  } else {
    largest = a.abs().amax();
    largest = at::where(largest.gt(0), largest, 1);
    state.y = a.div(largest);
    const bool single = dtype == at::kFloat;
    const double eps =
        single ? std::numeric_limits<float>::epsilon() : std::numeric_limits<double>::epsilon();
    for (int i = 0; i < (single ? 2 : 1); ++i) pass(state, wider, kShift * eps, false);
  }
  pass(state, wider, 0, false);
  pass(state, wider, 0, true);
  if (!wider) state.r.mul_(largest);

  at::Tensor q = state.y.to(dtype), r = state.r.to(dtype);
  if (!check) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    q = at::where(state.ok, q, nan);
    r = at::where(state.ok, r, nan);
  }
  return {q.contiguous(), r.contiguous(), state.ok};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastdeq, m) {
  m.def("cholesky_qr2(Tensor a, bool check, bool wide=True) -> (Tensor q, Tensor r, Tensor ok)",
        {at::Tag::pt2_compliant_tag});
  m.impl("cholesky_qr2",
         torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(cholesky_qr2)));
}

}  // namespace fastdeq
