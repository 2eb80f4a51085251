// Solves of an affine cell with a loop on the device around the library's product; see loop.cuh for
// the kernels and graph.h for the loop.
//
// On the host: one call. The iterations are a CUDA graph that is built for the solve, and that runs
// until the device sees that no sample is left; the host waits for nothing. Where there are no
// conditional nodes (drivers before CUDA 12.4) or the current stream is being captured already,
// there are no narrow products, and the iterations are enqueued one by one; so they are for a fixed
// number of iterations that takes no narrow products anyway. A kernel that finds no sample running
// then returns at once, but the products are made, and every few of them the host looks, without
// waiting, whether any sample runs, except where the count is fixed or nothing may be read.
//
// Memory, rows of d numbers per sample: value, point, product and one more; Anderson 2 (window +
// 1), heavy ball 1, the ramp 1.5 and a copy of the weight in bfloat16.
//
// No GPU has run this yet: kRampSize, kLookEvery and the choice of the graph are choices, not
// measurements.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <set>
#include <type_traits>

#include "arguments.h"
#include "graph.h"
#include "launch.h"
#include "library_product.h"
#include "lookout.h"
#include "loop.cuh"
#include "own_stream.h"

namespace fastdeq {
namespace {

using cuda::LoopTask;

constexpr int64_t kRampSize = 512;  // where precision="auto" takes narrow products
constexpr int kLookEvery = 4;       // iterations between two looks at the device
constexpr int64_t kMostSlots = 64;  // of the history, what shared memory has room for
static_assert(cuda::LoopShared<double>::bytes(kMostSlots - 1) <= kSharedUnasked);

template <typename T>
using StepKernel = void (*)(LoopTask<T>, const T*);

template <typename T>
StepKernel<T> step_kernel_for(bool wide, bool ramp) {
  constexpr int kWide = 16 / sizeof(T);
  if constexpr (std::is_same_v<T, float>) {
    if (ramp) return wide ? cuda::step_kernel<T, kWide, true> : cuda::step_kernel<T, 1, true>;
  }
  return wide ? cuda::step_kernel<T, kWide, false> : cuda::step_kernel<T, 1, false>;
}

bool is_aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

template <typename T>
class Loop {
 public:
  Loop(CudaSolve& solve, const Launch& launch, bool on_device, bool ramp)
      : launch_(launch), on_device_(on_device), ramp_(ramp), products_(place(solve)) {
    const SolvePointers<T> p = solve.pointers<T>();
    task_.options = solve.options(ramp);
    task_.batch = p.batch;
    task_.size = p.size;
    task_.activation = solve.activation;
    task_.counters = solve.counters();
    task_.offset = p.offset;
    task_.slope = p.slope;
    task_.start = p.start;
    task_.best = p.value;
    task_.status = p.status;
    task_.iterations = p.iterations;
    task_.residual = p.residual;
    task_.rejects = p.rejects;
    constexpr int kWide = 16 / sizeof(T);
    wide_ = p.size % kWide == 0 && is_aligned(p.offset) && is_aligned(p.slope);
    step_ = step_kernel_for<T>(wide_, ramp);
    blocks_ = unsigned(p.batch);
    threads_ = cuda::loop_threads(p.size, wide_ ? kWide : 1);
    shared_ = cuda::LoopShared<T>::bytes(task_.options.window);
  }

  void run() {
    const FloatProducts float_products;
    on_device_ ? run_on_device() : run_enqueued();
  }

  // phi'(W z + c) at the results.
  void slope(const at::Tensor& value, at::Tensor& value_slope) {
    const FloatProducts float_products;
    products_.exact(value);
    cuda::slope_kernel<T><<<blocks_, threads_, 0, launch_.stream>>>(
        task_, products_.product().template const_data_ptr<T>(), value_slope.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  LibraryProducts place(CudaSolve& solve) {
    const at::TensorOptions options = solve.offset.options();
    const int64_t batch = solve.batch(), size = solve.size(), slots = solve.method.window + 1;
    const auto take = [&](at::IntArrayRef shape, at::ScalarType dtype) {
      memory_.push_back(at::empty(shape, options.dtype(dtype)));
      return memory_.back();
    };
    const auto rows = [&](int64_t count) {
      return take({count * batch, size}, solve.dtype()).template mutable_data_ptr<T>();
    };
    const at::Tensor point = take({batch, size}, solve.dtype());
    task_.point = point.mutable_data_ptr<T>();
    task_.other = rows(1);
    if (solve.method.momentum) task_.last = rows(1);
    if (solve.method.window > 0) {
      task_.f_history = rows(slots);
      task_.g_history = rows(slots);
      task_.gram = take({batch, slots, slots}, at::kDouble).template mutable_data_ptr<double>();
    }
    const auto bytes = [&](size_t each, int64_t count) {
      return take({int64_t(each) * count}, at::kByte).mutable_data_ptr();
    };
    task_.samples = static_cast<cuda::Sample<T>*>(bytes(sizeof(cuda::Sample<T>), batch));
    task_.orders = static_cast<cuda::Order*>(bytes(sizeof(cuda::Order), batch));
    task_.control = static_cast<cuda::Control*>(bytes(sizeof(cuda::Control), 1));
    control_ = memory_.back();
    LibraryProducts products(take({batch, size}, solve.dtype()), point, solve.factor);
    if (ramp_) {
      task_.pre = rows(1);
      const at::Tensor change = take({batch, size}, at::kBFloat16);
      task_.change = static_cast<uint16_t*>(change.mutable_data_ptr());
      products.allow_narrow(change);
    }
    return products;
  }

  // Places every sample, and evaluates it where that takes no product.
  void start(cudaStream_t stream) {
    cuda::start_kernel<T><<<blocks_, threads_, 0, stream>>>(task_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (task_.start == nullptr) step(nullptr, stream);
  }

  void step(const T* product, cudaStream_t stream) {
    step_<<<blocks_, threads_, shared_, stream>>>(task_, product);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void run_enqueued() {
    const T* product = products_.product().template const_data_ptr<T>();
    start(launch_.stream);
    const bool looks = !task_.options.fixed && !is_capturing(launch_.stream);
    std::optional<Lookout> lookout;
    if (looks) lookout.emplace(control_, offsetof(cuda::Control, running));
    for (int32_t k = task_.start == nullptr; k <= task_.options.max_iter; ++k) {
      if (looks && k % kLookEvery == 0 && !lookout->any(launch_.stream)) return;
      products_.exact();
      step(product, launch_.stream);
    }
  }

  void run_on_device() {
#if CUDART_VERSION >= 12040
    const ForkedStream forked(c10::DeviceIndex(control_.get_device()));
    const cudaStream_t stream = forked.stream();
    warm_up();
    start(stream);
    DeviceLoop loop(ramp_);
    task_.conditions = loop.conditions();
    const Graph exact = capture(stream, [&] { products_.exact(); });
    const Graph narrow = ramp_ ? capture(stream, [&] { products_.narrow(); }) : Graph();
    const T* product = products_.product().template const_data_ptr<T>();
    loop.build({.function = reinterpret_cast<const void*>(&cuda::enter_kernel<T>),
                .blocks = 1,
                .threads = 1,
                .shared = 0,
                .arguments = {&task_}},
               exact, narrow,
               {.function = reinterpret_cast<const void*>(step_),
                .blocks = blocks_,
                .threads = threads_,
                .shared = shared_,
                .arguments = {&task_, &product}});
    loop.launch(stream);
#endif
  }

  // The library's first product of a shape may load kernels and take memory, better not while it is
  // captured. The results are overwritten.
  void warm_up() {
    thread_local std::set<std::array<int64_t, 6>> seen;
    const at::Tensor& product = products_.product();
    const std::array<int64_t, 6> shape = {
        product.get_device(), task_.batch, task_.size,
        int64_t(sizeof(T)),   ramp_,       products_.factor().stride(0)};
    if (!seen.insert(shape).second) return;
    products_.exact();
    if (ramp_) products_.narrow();
  }

  const Launch& launch_;
  const bool on_device_, ramp_;
  LoopTask<T> task_;
  std::vector<at::Tensor> memory_;
  at::Tensor control_;
  LibraryProducts products_;  // after what it is made of
  StepKernel<T> step_ = nullptr;
  bool wide_ = false;
  unsigned blocks_ = 0, threads_ = 0;
  size_t shared_ = 0;
};

bool wants_ramp(const CudaSolve& solve, c10::string_view precision, const DeviceLimits& limits) {
  return solve.dtype() == at::kFloat && precision != "float32" && limits.major >= 8 &&
         (precision == "mixed" || solve.size() >= kRampSize);
}

void run(CudaSolve& solve, c10::string_view precision) {
  TORCH_CHECK(solve.method.window < kMostSlots,
              "the CUDA loop takes an Anderson window of at most ", kMostSlots - 1, ", got ",
              solve.method.window);
  TORCH_CHECK(solve.batch() <= std::numeric_limits<int32_t>::max(),
              "too many samples: ", solve.batch());
  const Launch launch(solve.offset);
  const bool can_loop = has_conditional_nodes() && !is_capturing(launch.stream);
  const bool wanted = wants_ramp(solve, precision, launch.limits), ramp = wanted && can_loop;
  TORCH_CHECK(ramp || precision != "mixed",
              "precision='mixed' is not available in the CUDA loop: it needs float32, a driver for "
              "CUDA 12.4 or later, and a stream that is not being captured. precision='auto' uses "
              "it where it can be had; backend='triton' has it everywhere.");
  const bool on_device = can_loop && (ramp || !solve.fixed);
  const auto solve_as = [&](auto number) {
    Loop<decltype(number)> loop(solve, launch, on_device, ramp);
    loop.run();
    if (solve.value_slope.numel() > 0) loop.slope(solve.value, solve.value_slope);
  };
  solve.dtype() == at::kDouble ? solve_as(double()) : solve_as(float());
}

Forward solve_affine_loop(const at::Tensor& weight, const at::Tensor& injection,
                          const std::optional<at::Tensor>& start, c10::string_view activation,
                          c10::string_view solver, at::ArrayRef<double> solver_options, double tol,
                          int64_t max_iter, c10::string_view precision, bool slope,
                          bool symmetric) {
  if (injection.numel() == 0) {
    return by_reference(&solve_affine_loop, "fastdeq::solve_affine_reference", weight, injection,
                        start, activation, solver, solver_options, tol, max_iter, precision, slope,
                        symmetric);
  }
  const PlainOperations plain;
  CudaSolve solve = forward_solve(weight, injection, start, activation, solver, solver_options, tol,
                                  max_iter, precision, slope);
  run(solve, precision);
  return forward_outputs(solve, injection.scalar_type());
}

Adjoint solve_affine_adjoint_loop(const at::Tensor& weight, const at::Tensor& slope,
                                  const at::Tensor& grad, c10::string_view solver,
                                  at::ArrayRef<double> solver_options, double tol, int64_t max_iter,
                                  c10::string_view precision, bool symmetric,
                                  const std::optional<at::Tensor>& packed) {
  if (grad.numel() == 0) {
    return by_reference(&solve_affine_adjoint_loop, "fastdeq::solve_affine_adjoint_reference",
                        weight, slope, grad, solver, solver_options, tol, max_iter, precision,
                        symmetric, packed);
  }
  const PlainOperations plain;
  CudaSolve solve =
      adjoint_solve(weight, slope, grad, solver, solver_options, tol, max_iter, precision);
  run(solve, precision);
  return adjoint_outputs(solve, grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdeq, CUDA, m) {
  m.impl("solve_affine_loop", &solve_affine_loop);
  m.impl("solve_affine_adjoint_loop", &solve_affine_adjoint_loop);
}

}  // namespace fastdeq
