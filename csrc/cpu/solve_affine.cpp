// The solves of an affine cell on the CPU: arguments checked, one task for the engine, workers.
//
// A worker is a thread that takes samples from a common queue and iterates them to their end;
// between the packing of W and the last sample no thread waits for another. Only where there are
// fewer samples than threads do these share each product. Memory is taken before the loop. Whether
// threads are used at all, and what a signal does, is decided in threads.h and interrupt.h.
// Specification: fastdeq/ops/solve_affine.py and solve_affine_adjoint.py.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "common/solve_call.h"
#include "cpu/engine.h"
#include "cpu/interrupt.h"
#include "cpu/packed_weight.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace fastdeq {
namespace {

// Samples that share a worker's pass over W, a multiple of kRows. 96 are up to a tenth faster when
// solve follows solve, 36 when other work comes between, as it does in training: they touch less
// memory that is not in the caches. Fewer where a large window would take more than kScratchBytes.
constexpr int64_t kMostSlots = 36;
constexpr int64_t kScratchBytes = int64_t(1) << 28;

// A thread is used for no less than this, in multiply-adds of an assumed number of iterations, of
// which an iteration costs some beside its product: 15 us. Where the threads of the last region are
// still awake, less gains nothing (64 x 16: 28 us on one thread, 24 to 38 on two); a thread that
// sleeps takes 40 us to wake, which threads.h finds out.
constexpr double kWorkPerThread = 1.25e6;
constexpr double kAssumedIterations = 16;
constexpr double kWorkBesideEntry = 64;

// Fewer samples than threads share the panels of each product, if it has so many multiply-adds: a
// thread's part must take longer than waking and awaiting it.
constexpr int64_t kSharedProduct = int64_t(1) << 19;

// Up to this size a worker packs W for itself; see docs/how-it-works.md for the measurements.
constexpr int64_t kOwnCopySize = 256;

bool is_packed(const at::Tensor& t, const PackedHeader& needed) {
  return t.device().is_cpu() && t.scalar_type() == at::kByte && t.is_contiguous() &&
         t.numel() == packed_bytes(needed.size) &&
         *static_cast<const PackedHeader*>(t.const_data_ptr()) == needed;
}

void share_product(Sharing* sharing, int64_t count, void* context,
                   void (*body)(void*, int64_t, int64_t)) {
  parallel_for(count, 1, *sharing, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Solves the call, with the packed weight that was passed where that fits.
template <typename T>
void run(SolveCall& call) {
  SolveTask<T> task;
  fill_task<T>(task, call);
  const Precision precision = call.options.precision;
  const bool symmetric = call.bitwise_symmetric;
  const bool triangle = symmetric && task.batch <= kTriangleBatch && task.size >= kTriangleSize &&
                        precision != Precision::kMixed;
  task.low_precision = !triangle && uses_low_precision<T>(task.size, precision);

  const EngineFor<T>& engine = engine_for<T>();
  const double product = double(task.size) * double(task.size) * double(task.batch);
  const double beside = kWorkBesideEntry * double(task.size) * double(task.batch);
  const double work = (product + beside) * kAssumedIterations;
  const int64_t threads = available_threads();
  const bool shared = task.batch < threads && product >= kSharedProduct;
  int64_t workers = shared ? 1
                           : std::clamp<int64_t>(int64_t(work / kWorkPerThread), 1,
                                                 std::min(threads, task.batch));
  Sharing* const sharing = shared        ? &sharing_of(Shared::kProduct, work)
                           : workers > 1 ? &sharing_of(Shared::kSamples, work)
                                         : nullptr;
  if (workers > 1 && !sharing->is_worthwhile()) workers = 1;
  task.parallel_for = shared ? &share_product : nullptr;
  task.sharing = sharing;
  const int64_t each = (task.batch + workers - 1) / workers;
  task.slots = 1;
  const int64_t one = engine.scratch_bytes(task);
  task.slots = std::min(each, std::clamp<int64_t>(kScratchBytes / workers / one, 1, kMostSlots));

  if (triangle) task.triangle_parts = shared ? threads : 1;
  const auto bytes = call.weight.options().dtype(at::kByte);
  const Workspace<0> scratch(workers * engine.scratch_bytes(task), bytes);
  task.scratch = static_cast<std::byte*>(scratch.memory().mutable_data_ptr());
  std::atomic<int64_t> next_sample{0};
  task.next_sample = &next_sample;
  Interrupt interrupt;
  task.interrupted = &interrupt.requested();
  task.look = [](void* context) { static_cast<Interrupt*>(context)->look(); };
  task.look_context = &interrupt;

  const bool fits = symmetric && !triangle && call.packed.defined() &&
                    is_packed(call.packed, packed_header(task));
  const bool packs = !fits && !triangle;
  const int64_t room = packed_bytes(task.size);
  // What one thread writes the others have to fetch from its cache.
  const bool own_copies = packs && workers > 1 && task.size <= kOwnCopySize;
  std::optional<Workspace<1>> lent;
  if (packs) lent.emplace(own_copies ? workers * room : room, bytes);
  std::byte* const at_packed =
      triangle ? nullptr
               : static_cast<std::byte*>(
                     const_cast<void*>((fits ? call.packed : lent->memory()).const_data_ptr()));
  const int64_t panels = engine.panels(task.size), padded = engine.padded(task.size);
  if (!triangle) place_packed(task, at_packed, padded);
  if (packs && !own_copies) pack_all(task, workers > 1 || shared);
  if (workers == 1) {
    engine.work(task, 0);
  } else {
    run_workers(workers, *sharing, interrupt, [&](int64_t worker) {
      if (next_sample.load(std::memory_order_relaxed) >= task.batch) return;  // it is late
      SolveTask<T> own = task;
      if (own_copies) {
        place_packed(own, at_packed + worker * room, padded);
        engine.pack(own, 0, panels);
      }
      engine.work(own, worker);
    });
  }
  interrupt.rethrow();
}

void solve(SolveCall& call) {
  if (call.is_empty()) return;
  AT_DISPATCH_FLOATING_TYPES(call.dtype(), "solve_affine", [&] { run<scalar_t>(call); });
}

void solve_affine(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  BoxedArguments arguments(op, *stack);
  if (!arguments.are_for("cpp")) return;
  SolveCall call = read_forward(arguments);
  solve(call);
  return_forward(arguments, call);
}

void solve_affine_adjoint(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  BoxedArguments arguments(op, *stack);
  if (!arguments.are_for("cpp")) return;
  SolveCall call = read_adjoint(arguments);
  solve(call);
  return_adjoint(arguments, call);
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
  m.impl("solve_affine", torch::CppFunction::makeFromBoxedFunction<&solve_affine>());
  m.impl("solve_affine_adjoint",
         torch::CppFunction::makeFromBoxedFunction<&solve_affine_adjoint>());
  m.impl("engine_activation", &engine_activation);
}

}  // namespace fastdeq
