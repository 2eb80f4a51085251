// Solves of an affine cell in one cooperative launch, with W in the shared memory of all
// multiprocessors; see persistent.cuh for the kernel and persistent_plan.h for its layout.
//
// Nothing is read back and nothing waits, so that a solve may be captured into a CUDA graph.
// Scratch memory comes from the caching allocator: two tiles of points for each group, and for
// Anderson 2 (window + 1) numbers per element of the tiles in work.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "arguments.h"
#include "launch.h"
#include "persistent.cuh"

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

template <typename T>
PersistentTask<T> task_of(CudaSolve& solve) {
  const SolvePointers<T> p = solve.pointers<T>();
  PersistentTask<T> task{};
  task.size = int(p.size);
  task.batch = p.batch;
  task.weight = p.weight;
  task.output_stride = p.output_stride;
  task.input_stride = p.input_stride;
  task.offset = p.offset;
  task.slope = p.slope;
  task.start = p.start;
  task.activation = solve.activation;
  task.counters = solve.counters();
  task.value = p.value;
  task.status = p.status;
  task.iterations = p.iterations;
  task.residual = p.residual;
  task.rejects = p.rejects;
  task.value_slope = p.value_slope;
  task.options = solve.options(false);
  return task;
}

// A block that waits for another one must not keep it from running: all of them have to fit at
// once.
template <typename T>
void check_residency(PersistentKernel<T> kernel, const PersistentPlan& plan, int threads,
                     const DeviceLimits& limits) {
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                               size_t(plan.shared_bytes)));
  const int64_t wanted = int64_t(plan.members) * plan.groups;
  TORCH_CHECK(wanted <= int64_t(blocks) * limits.multiprocessors, "the persistent solver needs ",
              wanted, " blocks at a time, this device holds ",
              int64_t(blocks) * limits.multiprocessors);
}

template <typename T>
void run(CudaSolve& solve) {
  TORCH_CHECK(solve.size() <= std::numeric_limits<int32_t>::max(),
              "too large a state: ", solve.size());
  const Launch launch(solve.offset);
  TORCH_CHECK(launch.limits.cooperative && launch.limits.major >= 8,
              "the persistent solver needs cooperative launches and compute capability 8.0, this "
              "device has ",
              launch.limits.major, ".", launch.limits.minor);
  PersistentTask<T> task = task_of<T>(solve);
  const PersistentPlan plan = cuda::plan_persistent(
      cuda::persistent_problem(task),
      {launch.limits.multiprocessors, int64_t(launch.limits.shared_per_block)});
  TORCH_CHECK(plan.reason.empty(), "the persistent solver cannot be used: ", plan.reason);

  constexpr int kThreads = cuda::kPersistentWarps * cuda::kWarpLanes;
  const PersistentKernel<T> kernel = kernel_of<T>(plan.tile);
  raise_shared_limit(kernel, size_t(plan.shared_bytes), launch.limits);
  check_residency<T>(kernel, plan, kThreads, launch.limits);
  const at::Tensor scratch =
      at::empty({plan.scratch_bytes}, solve.offset.options().dtype(at::kByte));
  auto* const memory = static_cast<unsigned char*>(scratch.mutable_data_ptr());
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, size_t(plan.counter_bytes), launch.stream));
  cuda::apply_plan(task, plan, memory);
  void* arguments[] = {&task};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), dim3(unsigned(plan.members * plan.groups)),
      dim3(kThreads), arguments, size_t(plan.shared_bytes), launch.stream));
}

Forward solve_affine_persistent(const at::Tensor& weight, const at::Tensor& injection,
                                const std::optional<at::Tensor>& start, c10::string_view activation,
                                c10::string_view solver, at::ArrayRef<double> solver_options,
                                double tol, int64_t max_iter, c10::string_view precision,
                                bool slope, bool symmetric) {
  if (injection.numel() == 0) {
    return by_reference(&solve_affine_persistent, "fastdeq::solve_affine_reference", weight,
                        injection, start, activation, solver, solver_options, tol, max_iter,
                        precision, slope, symmetric);
  }
  const PlainOperations plain;
  CudaSolve solve = forward_solve(weight, injection, start, activation, solver, solver_options, tol,
                                  max_iter, precision, slope);
  TORCH_CHECK(precision != "mixed", "the persistent solver has no narrow products");
  solve.dtype() == at::kDouble ? run<double>(solve) : run<float>(solve);
  return forward_outputs(solve, injection.scalar_type());
}

Adjoint solve_affine_adjoint_persistent(const at::Tensor& weight, const at::Tensor& slope,
                                        const at::Tensor& grad, c10::string_view solver,
                                        at::ArrayRef<double> solver_options, double tol,
                                        int64_t max_iter, c10::string_view precision,
                                        bool symmetric, const std::optional<at::Tensor>& packed) {
  if (grad.numel() == 0) {
    return by_reference(&solve_affine_adjoint_persistent, "fastdeq::solve_affine_adjoint_reference",
                        weight, slope, grad, solver, solver_options, tol, max_iter, precision,
                        symmetric, packed);
  }
  const PlainOperations plain;
  CudaSolve solve =
      adjoint_solve(weight, slope, grad, solver, solver_options, tol, max_iter, precision);
  TORCH_CHECK(precision != "mixed", "the persistent solver has no narrow products");
  solve.dtype() == at::kDouble ? run<double>(solve) : run<float>(solve);
  return adjoint_outputs(solve, grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CUDA, m) {
  m.impl("solve_affine_persistent", &solve_affine_persistent);
  m.impl("solve_affine_adjoint_persistent", &solve_affine_adjoint_persistent);
}

}  // namespace fastdeq
