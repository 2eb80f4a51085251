// The persistent solver of csrc/cuda on the emulated machine, for tests/cuda/test_cuda_persistent.py.

#include "cuda/persistent.cuh"

#include <exception>
#include <vector>

namespace {

using namespace fastdeq;
using namespace fastdeq::cuda;

// Mirrored by a ctypes structure in the test; pointers are to numbers of the dtype asked for.
struct Call {
  int64_t size, batch;
  const void *weight, *offset, *slope, *start;
  int64_t output_stride, input_stride;
  int32_t activation;
  SolveOptions options;
  void* value;
  int8_t* status;
  int32_t* iterations;
  void* residual;
  int32_t* rejects;
  void* value_slope;

  int32_t multiprocessors, warps, only_tile, only_plan;
  int64_t shared_bytes;
  uint64_t seed;
  const char* skip;  // "file:line" of a synchronisation to leave out

  // What was planned, and whether the line to be skipped was met.
  int32_t skipped, tile, members, groups, tiles, tile_rows, tile_columns, splits, chunk;
  int64_t shared_planned, scratch_bytes, counter_bytes;
};

template <typename T>
auto kernel_of(int tile) {
  using Kernel = void (*)(PersistentTask<T>);
  constexpr auto choose = []<int kTile>(std::integral_constant<int, kTile>) -> Kernel {
    return &persistent_solve<T, kRegisterTiles[kTile].rows, kRegisterTiles[kTile].columns>;
  };
  const Kernel kernels[] = {
      choose(std::integral_constant<int, 0>()), choose(std::integral_constant<int, 1>()),
      choose(std::integral_constant<int, 2>()), choose(std::integral_constant<int, 3>())};
  return kernels[tile];
}

template <typename T>
PersistentTask<T> read(const Call& c) {
  PersistentTask<T> task{};
  task.size = int(c.size);
  task.batch = c.batch;
  task.weight = static_cast<const T*>(c.weight);
  task.output_stride = c.output_stride;
  task.input_stride = c.input_stride;
  task.injection = static_cast<const T*>(c.offset);
  task.slope = static_cast<const T*>(c.slope);
  task.start = static_cast<const T*>(c.start);
  task.activation = c.activation;
  task.options = c.options;
  task.value = static_cast<T*>(c.value);
  task.status = c.status;
  task.iterations = c.iterations;
  task.residual = static_cast<T*>(c.residual);
  task.rejects = c.rejects;
  task.value_slope = static_cast<T*>(c.value_slope);
  return task;
}

template <typename T>
std::string run(Call& c) {
  PersistentTask<T> task = read<T>(c);
  const PersistentPlan plan = plan_persistent(
      persistent_problem(task), {c.multiprocessors, c.shared_bytes}, c.warps, c.only_tile);
  if (!plan.reason.empty()) return plan.reason;
  c.tile = plan.tile;
  c.members = plan.members;
  c.groups = plan.groups;
  c.tiles = plan.tiles;
  c.tile_rows = plan.tile_rows;
  c.tile_columns = plan.tile_columns;
  c.splits = plan.splits;
  c.chunk = plan.chunk;
  c.shared_planned = plan.shared_bytes;
  c.scratch_bytes = plan.scratch_bytes;
  c.counter_bytes = plan.counter_bytes;
  if (c.only_plan) return "";

  // Scratch holds NaN, and is followed by bytes that must stay.
  constexpr size_t kGuard = 1024;
  const size_t bytes = size_t(plan.scratch_bytes);
  std::vector<cuda_emulator::Line> scratch((bytes + kGuard) / sizeof(cuda_emulator::Line) + 1);
  auto* const memory = scratch.data()->bytes;
  std::memset(memory, 0xff, bytes + kGuard);
  std::memset(memory, 0, size_t(plan.counter_bytes));
  apply_plan(task, plan, memory);
  cuda_emulator::machine.skip = c.skip;
  emulate(kernel_of<T>(plan.tile), unsigned(plan.members * plan.groups), unsigned(c.warps) * 32,
          size_t(plan.shared_bytes), c.seed, task);
  c.skipped = cuda_emulator::machine.skipped;
  for (size_t i = bytes; i < bytes + kGuard; ++i) {
    if (memory[i] != 0xff) return "a write outside of the scratch memory";
  }
  return "";
}

}  // namespace

// The reason why it failed, empty if it did not.
extern "C" const char* persistent_solve_call(Call* call, int is_double) {
  static std::string message;
  try {
    message = is_double ? run<double>(*call) : run<float>(*call);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
