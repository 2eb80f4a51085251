// The solves of an affine cell on the CPU: arguments checked, one task for the engine, workers.
//
// A worker is a thread that takes samples from a common queue and iterates them to their end;
// between the packing of W and the last sample no thread waits for another. Only where there are
// fewer samples than threads do these share each product. Memory is taken before the loop.
// Specification: fastdeq/affine.py, whose form serves what the engine does not.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "engine.h"
#include "packed_weight.h"
#include "solve_arguments.h"

namespace fastdeq {
namespace {

// As in fastdeq/solvers and fastdeq/driver.py.
constexpr double kResidualEps = 1e-9;

// Samples that share a worker's pass over W, a multiple of kRows. 96 are up to a tenth faster when
// solve follows solve, 36 when other work comes between, as it does in training: they touch less
// memory that is not in the caches. Fewer where a large window would take more than kScratchBytes.
constexpr int64_t kMostLines = 36;
constexpr int64_t kScratchBytes = int64_t(1) << 28;

// A thread is woken for no less than this, in multiply-adds of an assumed number of iterations.
constexpr double kWorkPerThread = 5e5;
constexpr double kAssumedIterations = 16;

// Fewer samples than threads share the panels of each product, if it has so many multiply-adds: a
// thread's part must take longer than waking and awaiting it.
constexpr int64_t kSharedProduct = int64_t(1) << 19;

// Where the ramp wins; see docs/how-it-works.md for the measurements.
constexpr int64_t kRampSize = 48;

// Up to so many samples, and from that size on, a symmetric weight is not packed; of it the upper
// triangle is read. See docs/how-it-works.md for the measurements.
constexpr int64_t kTriangleBatch = 2;
constexpr int64_t kTriangleSize = 512;

using Forward =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Adjoint = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
const EngineFor<T>& engine_for() {
  if constexpr (std::is_same_v<T, float>) {
    return engine().for_float;
  } else {
    return engine().for_double;
  }
}

bool is_packed(const at::Tensor& t, const PackedHeader& wanted) {
  return t.device().is_cpu() && t.scalar_type() == at::kByte && t.is_contiguous() &&
         t.numel() == packed_bytes(wanted.size) &&
         *static_cast<const PackedHeader*>(t.const_data_ptr()) == wanted;
}

// Memory of a calling thread that outlives the call: fresh pages cost more than a small solve. A
// large one is not kept.
constexpr int64_t kKeptBytes = int64_t(1) << 25;

template <int kUse>
at::Tensor workspace(int64_t bytes, const at::TensorOptions& options) {
  thread_local at::Tensor kept;
  if (bytes > kKeptBytes) return at::empty({bytes}, options);
  if (!kept.defined() || kept.numel() < bytes) kept = at::empty({bytes}, options);
  return kept;
}

struct Outputs {
  at::Tensor value, status, iterations, residual, rejects;

  Outputs(const at::Tensor& like, at::ScalarType dtype, int64_t counters) {
    const auto options = like.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
    const int64_t batch = like.size(0);
    value = at::empty(like.sizes(), options);
    status = at::empty({batch}, options.dtype(at::kChar));
    iterations = at::empty({batch}, options.dtype(at::kInt));
    residual = at::empty({batch}, options);
    rejects = at::empty({batch, counters}, options.dtype(at::kInt));
  }
};

void parallel_for(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
  at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// `transposed`: products with W^T, as the forward map has them, instead of W. Uses what the forward
// solve has `kept` where that fits, and returns the buffer that it packed the weight into
// otherwise.
template <typename T>
at::Tensor run(SolveTask<T>& task, const Method& method, const at::Tensor& weight, bool transposed,
               bool symmetric, c10::string_view precision, const std::optional<at::Tensor>& kept,
               Outputs& out) {
  task.value = out.value.mutable_data_ptr<T>();
  task.status = out.status.mutable_data_ptr<int8_t>();
  task.iterations = out.iterations.mutable_data_ptr<int32_t>();
  task.residual = out.residual.mutable_data_ptr<T>();
  if (counters_of(method.solver) > 0) task.rejects = out.rejects.mutable_data_ptr<int32_t>();
  task.batch = out.value.size(0);
  task.size = out.value.size(1);

  task.weight = weight.const_data_ptr<T>();
  task.output_stride = weight.stride(transposed ? 0 : 1);
  task.input_stride = weight.stride(transposed ? 1 : 0);
  task.residual_eps = kResidualEps;
  task.patience = method.patience;
  task.solver = method.solver;
  task.fixed = method.fixed_iterations > 0;
  if (task.fixed) task.max_iter = method.fixed_iterations;
  task.momentum = method.momentum;
  task.radius = method.radius;
  task.most_directions = method.most_directions;
  task.damping = method.damping;
  task.window = method.window;
  task.safeguard = method.safeguard;
  task.accelerate_above = method.accelerate_above;
  task.anderson = method.anderson;
  const bool triangle = symmetric && task.batch <= kTriangleBatch && task.size >= kTriangleSize &&
                        precision != "mixed";
  task.ramp = std::is_same_v<T, float> && has_ramp() && precision != "float32" && !triangle &&
              (precision == "mixed" || task.size >= kRampSize);

  const EngineFor<T>& engine = engine_for<T>();
  const double work =
      double(task.size) * double(task.size) * double(task.batch) * kAssumedIterations;
#if defined(_OPENMP)
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
#else
  const int64_t threads = 1;  // at::parallel_for is serial here
#endif
  const bool shared = task.batch < threads && task.size * task.size * task.batch >= kSharedProduct;
  const int64_t workers = shared ? 1
                                 : std::clamp<int64_t>(int64_t(work / kWorkPerThread), 1,
                                                       std::min(threads, task.batch));
  task.parallel_for = shared ? &parallel_for : nullptr;
  const int64_t each = (task.batch + workers - 1) / workers;
  task.lines = 1;
  const int64_t one = engine.scratch_bytes(task);
  task.lines = std::min(each, std::clamp<int64_t>(kScratchBytes / workers / one, 1, kMostLines));

  if (triangle) task.triangle_parts = shared ? threads : 1;
  const auto bytes = weight.options().dtype(at::kByte);
  const at::Tensor scratch = workspace<0>(workers * engine.scratch_bytes(task), bytes);
  task.scratch = static_cast<std::byte*>(scratch.mutable_data_ptr());
  std::atomic<int64_t> next_sample{0};
  task.next_sample = &next_sample;

  const PackedHeader wanted = packed_header(task, &engine);
  const bool fits = symmetric && kept.has_value() && is_packed(*kept, wanted);
  const int64_t room = packed_bytes(task.size);
  const at::Tensor packed = fits        ? *kept
                            : symmetric ? at::empty({room}, bytes)  // outlives the call
                                        : workspace<1>(room, bytes);
  auto* const at_packed = static_cast<std::byte*>(const_cast<void*>(packed.const_data_ptr()));
  place_packed(task, at_packed, engine.padded(task.size));
  if (triangle && !fits) {
    *reinterpret_cast<PackedHeader*>(at_packed) = {};
  } else if (!fits) {
    // A panel of a few hundred inputs is worth a thread.
    const int64_t grain =
        workers > 1 || shared ? std::max<int64_t>(1, 1024 / task.size) : INT64_MAX;
    at::parallel_for(0, engine.panels(task.size), grain,
                     [&](int64_t begin, int64_t end) { engine.pack(task, begin, end); });
    *reinterpret_cast<PackedHeader*>(at_packed) = wanted;
  }
  if (workers == 1) {
    engine.work(task, 0);
    return packed;
  }
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) engine.work(task, worker);
  });
  return packed;
}

Forward solve_affine(const at::Tensor& weight, const at::Tensor& injection,
                     const std::optional<at::Tensor>& start, c10::string_view activation,
                     c10::string_view solver, at::ArrayRef<double> solver_options, double tol,
                     int64_t max_iter, c10::string_view precision, bool slope, bool symmetric) {
  check_precision(precision);
  const Method method = read_method(solver, solver_options, max_iter);
  if (!method.served || injection.numel() == 0) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastdeq::solve_affine_reference", "")
                               .typed<decltype(solve_affine)>();
    Forward outputs = op.call(weight, injection, start, activation, solver, solver_options, tol,
                              max_iter, precision, slope, symmetric);
    if (symmetric) {  // as a tracer expects it
      const auto bytes = injection.options().dtype(at::kByte);
      std::get<6>(outputs) = at::zeros({packed_bytes(injection.size(1))}, bytes);
    }
    return outputs;
  }
  const at::Tensor given_start = start.value_or(at::Tensor());
  check_solve(weight, injection, given_start, "injection", "start");
  const at::ScalarType dtype = working_dtype({weight, injection, given_start});
  const at::Tensor w = prepare_weight(weight, dtype), c = prepare(injection, dtype);
  const at::Tensor z0 = given_start.defined() ? prepare(given_start, dtype) : at::Tensor();
  Outputs out(c, dtype, counters_of(method.solver));
  at::Tensor value_slope = slope ? at::empty_like(c) : at::empty({0}, c.options());
  at::Tensor packed;
  AT_DISPATCH_FLOATING_TYPES(dtype, "solve_affine", [&] {
    SolveTask<scalar_t> task;
    task.injection = c.const_data_ptr<scalar_t>();
    task.start = z0.defined() ? z0.const_data_ptr<scalar_t>() : nullptr;
    task.activation = known_activation(activation);
    task.tol = tol;
    task.max_iter = max_iter;
    task.value_slope = slope ? value_slope.mutable_data_ptr<scalar_t>() : nullptr;
    packed = run(task, method, w, true, symmetric, precision, std::nullopt, out);
  });
  return {out.value.to(injection.scalar_type()),
          out.status,
          out.iterations,
          out.residual,
          out.rejects,
          value_slope,
          symmetric ? packed : at::empty({0}, packed.options())};
}

Adjoint solve_affine_adjoint(const at::Tensor& weight, const at::Tensor& slope,
                             const at::Tensor& grad, c10::string_view solver,
                             at::ArrayRef<double> solver_options, double tol, int64_t max_iter,
                             c10::string_view precision, bool symmetric,
                             const std::optional<at::Tensor>& packed) {
  check_precision(precision);
  const Method method = read_method(solver, solver_options, max_iter);
  if (!method.served || grad.numel() == 0) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastdeq::solve_affine_adjoint_reference", "")
                               .typed<decltype(solve_affine_adjoint)>();
    return op.call(weight, slope, grad, solver, solver_options, tol, max_iter, precision, symmetric,
                   packed);
  }
  check_solve(weight, grad, slope, "grad", "slope");
  const at::ScalarType dtype = working_dtype({weight, slope, grad});
  const at::Tensor w = prepare_weight(weight, dtype), g = prepare(grad, dtype);
  const at::Tensor d = prepare(slope, dtype);
  Outputs out(g, dtype, counters_of(method.solver));
  AT_DISPATCH_FLOATING_TYPES(dtype, "solve_affine_adjoint", [&] {
    SolveTask<scalar_t> task;
    task.injection = g.const_data_ptr<scalar_t>();
    task.slope = d.const_data_ptr<scalar_t>();
    task.tol = tol;
    task.max_iter = max_iter;
    run(task, method, w, false, symmetric, precision, packed, out);
  });
  return {out.value.to(grad.scalar_type()), out.status, out.iterations, out.residual, out.rejects};
}

// phi (derivative 0) or phi' (1) as the engine computes it.
at::Tensor engine_activation(const at::Tensor& x, c10::string_view activation, int64_t derivative) {
  TORCH_CHECK(x.device().is_cpu() && x.is_floating_point(),
              "a floating-point CPU tensor is needed");
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "engine_activation", [&] {
    engine_for<scalar_t>().activate(known_activation(activation), int(derivative),
                                    in.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>(),
                                    in.numel());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastdeq, m) {
  m.def("engine_activation(Tensor x, str activation, int derivative) -> Tensor");
}

TORCH_LIBRARY_IMPL(fastdeq, CPU, m) {
  m.impl("solve_affine", &solve_affine);
  m.impl("solve_affine_adjoint", &solve_affine_adjoint);
  m.impl("engine_activation", &engine_activation);
}

}  // namespace fastdeq
