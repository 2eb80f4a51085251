// Solves of an affine cell in one cooperative launch, with W in the shared memory of all
// multiprocessors; see persistent.cuh for the kernel and persistent_plan.h for its layout.
//
// Nothing is read back and nothing waits, so that a solve may be recorded in a CUDA graph.
// Scratch memory comes from the caching allocator: two tiles of points for each group, and for
// Anderson 2 (window + 1) numbers per element of the tiles in work.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <limits>
#include <type_traits>

#include "common/solve_call.h"
#include "cuda/launch.h"
#include "cuda/persistent.cuh"
#include "cuda/rows.cuh"

namespace fastdeq {
namespace {

using cuda::PersistentPlan;
using cuda::PersistentTask;

template <typename T>
using PersistentKernel = void (*)(PersistentTask<T>);

template <typename T>
PersistentKernel<T> kernel_of(int tile) {
  PersistentKernel<T> kernel = nullptr;
  const auto take_if = [&]<int kTile>(std::integral_constant<int, kTile>) {
    constexpr cuda::RegisterTile r = cuda::kRegisterTiles[kTile];
    if (kTile == tile) kernel = &cuda::persistent_solve<T, r.rows, r.columns>;
  };
  [&]<int... kTiles>(std::integer_sequence<int, kTiles...>) {
    (take_if(std::integral_constant<int, kTiles>()), ...);
  }(std::make_integer_sequence<int, cuda::kRegisterTileCount>());
  return kernel;
}

// A block that waits for another one must not keep it from running: all of them have to fit at
// once.
template <typename T>
void check_residency(PersistentKernel<T> kernel, const PersistentPlan& plan, int threads,
                     const DeviceLimits& limits) {
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                               size_t(plan.shared_bytes)));
  const int64_t needed = int64_t(plan.members) * plan.groups;
  TORCH_CHECK(needed <= int64_t(blocks) * limits.multiprocessors, "the persistent solver needs ",
              needed, " blocks at a time, this device holds ",
              int64_t(blocks) * limits.multiprocessors);
}

template <typename T>
void run(SolveCall& call) {
  TORCH_CHECK(call.size() <= std::numeric_limits<int32_t>::max(),
              "too large a state: ", call.size());
  const Launch launch(call.rows);
  TORCH_CHECK(launch.limits.cooperative && launch.limits.major >= 8,
              "the persistent solver needs cooperative launches and compute capability 8.0, this "
              "device has ",
              launch.limits.major, ".", launch.limits.minor);
  PersistentTask<T> task{};
  fill_task<T>(task, call);
  const PersistentPlan plan = cuda::plan_persistent(
      cuda::persistent_problem(task),
      {launch.limits.multiprocessors, int64_t(launch.limits.shared_per_block)});
  TORCH_CHECK(plan.reason.empty(), "the persistent solver cannot be used: ", plan.reason);

  constexpr int kThreads = cuda::kPersistentWarps * cuda::kWarpLanes;
  const PersistentKernel<T> kernel = kernel_of<T>(plan.tile);
  raise_shared_limit(kernel, size_t(plan.shared_bytes), launch.limits);
  check_residency<T>(kernel, plan, kThreads, launch.limits);
  const at::Tensor scratch = at::empty({plan.scratch_bytes}, call.rows.options().dtype(at::kByte));
  auto* const memory = static_cast<unsigned char*>(scratch.mutable_data_ptr());
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, size_t(plan.counter_bytes), launch.stream));
  cuda::apply_plan(task, plan, memory);
  void* arguments[] = {&task};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), dim3(unsigned(plan.members * plan.groups)),
      dim3(kThreads), arguments, size_t(plan.shared_bytes), launch.stream));
}

void check_support(const SolveCall& call) {
  const Solver solver = call.options.solver;
  TORCH_CHECK(solver != Solver::kEnergy && solver != Solver::kMinres,
              "the persistent solver has 'picard', 'neumann', 'anderson' and 'heavy_ball'");
  TORCH_CHECK(call.options.precision != Precision::kMixed,
              "the persistent solver has no low-precision products");
}

template <typename T>
void solve_forward(SolveCall& call) {
  if (call.start.defined()) {
    call.start = at::where(at::isfinite(call.start).all(1, true), call.start, 0);
  }
  run<T>(call);
}

// With the gradient in unit rows, see rows.cuh, and the solution back in its scale.
template <typename T>
void solve_adjoint(SolveCall& call) {
  const at::Tensor grad = call.rows;
  const at::Tensor norm = at::empty({call.batch()}, grad.options()), largest = at::empty_like(norm);
  call.rows = at::empty_like(grad);
  const Launch launch(grad);
  cuda::scale_rows(call.slope.const_data_ptr<T>(), grad.const_data_ptr<T>(), call.batch(),
                   call.size(), call.rows.mutable_data_ptr<T>(), norm.mutable_data_ptr<T>(),
                   largest.mutable_data_ptr<T>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  run<T>(call);
  T* const value = call.value.mutable_data_ptr<T>();
  cuda::restore_rows(value, norm.const_data_ptr<T>(), largest.const_data_ptr<T>(), call.batch(),
                     call.size(), value, launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// While it lives, what is called is neither recorded for gradients nor autocast.
struct PlainOperations {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

void solve_affine(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  BoxedArguments arguments(op, *stack);
  if (!arguments.are_for("persistent")) return;
  const PlainOperations plain;
  SolveCall call = read_forward(arguments);
  check_support(call);
  if (!call.is_empty()) {
    call.dtype() == at::kDouble ? solve_forward<double>(call) : solve_forward<float>(call);
  }
  return_forward(arguments, call);
}

void solve_affine_adjoint(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  BoxedArguments arguments(op, *stack);
  if (!arguments.are_for("persistent")) return;
  const PlainOperations plain;
  SolveCall call = read_adjoint(arguments);
  check_support(call);
  if (!call.is_empty()) {
    call.dtype() == at::kDouble ? solve_adjoint<double>(call) : solve_adjoint<float>(call);
  }
  return_adjoint(arguments, call);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CUDA, m) {
  m.impl("solve_affine", torch::CppFunction::makeFromBoxedFunction<&solve_affine>());
  m.impl("solve_affine_adjoint",
         torch::CppFunction::makeFromBoxedFunction<&solve_affine_adjoint>());
}

}  // namespace fastdeq
