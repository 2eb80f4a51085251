// The kernels of csrc/cuda/loop.cuh on the emulated machine, with products by the CPU in between,
// for tests/test_cuda_loop.py: the work of csrc/cuda/loop.cu.

#include <cuda_runtime.h>

#include <cstdint>

// The conditional values of an emulated graph, by handle.
inline unsigned conditional_values[4];
inline void cudaGraphSetConditional(unsigned long long handle, unsigned value) {
  conditional_values[handle] = value;
}

#include <exception>
#include <vector>

#include "cuda/loop.cuh"

namespace {

using namespace fastdeq;
using namespace fastdeq::cuda;

// Mirrored by a ctypes structure in the test; pointers are to numbers of the dtype asked for.
struct Call {
  int64_t size, batch;
  const void *factor, *offset, *slope, *start;  // factor (size, size): product = rows @ factor
  int32_t activation, max_iter, fixed, patience, momentum, window;
  double tol, damping, radius, regularization, rank_tolerance, max_weight;
  double safeguard, accelerate_above;
  int32_t ramp, graph, pack;
  void* value;
  int8_t* status;
  int32_t* iterations;
  void* residual;
  int32_t* rejects;
  void* value_slope;

  uint64_t seed;
  const char* skip;  // "file:line" of a synchronisation to leave out
  int32_t skipped, exact_products, narrow_products;  // out
};

// Memory that holds NaN.
struct Poisoned {
  explicit Poisoned(size_t bytes) : memory(bytes / 16 + 1) {
    std::memset(memory.data(), 0xff, memory.size() * 16);
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(memory.data());
  }
  struct alignas(16) Line {
    unsigned char bytes[16];
  };
  std::vector<Line> memory;
};

float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
void multiply(const LoopTask<T>& task, const T* rows, const T* factor, T* product) {
  const int64_t n = task.size;
  for (int64_t b = 0; b < task.batch; ++b) {
    for (int64_t j = 0; j < n; ++j) product[b * n + j] = 0;
    for (int64_t k = 0; k < n; ++k) {
      const T row = rows[b * n + k];
      for (int64_t j = 0; j < n; ++j) product[b * n + j] += row * factor[k * n + j];
    }
  }
}

template <typename T, int kPack, bool kRamp>
void solve(Call& c) {
  LoopTask<T> task;
  SolveOptions& o = task.options;
  o.tol = c.tol;
  o.max_iter = c.max_iter;
  o.fixed = c.fixed != 0;
  o.patience = c.patience;
  o.damping = c.damping;
  o.momentum = c.momentum != 0;
  o.radius = c.radius;
  o.window = c.window;
  o.safeguard = c.safeguard;
  o.accelerate_above = c.accelerate_above;
  o.anderson = {c.damping, c.regularization, c.rank_tolerance, c.max_weight};
  o.ramp = kRamp;
  task.batch = c.batch;
  task.size = c.size;
  task.activation = c.activation;
  task.counters = c.window > 0 ? 3 : 0;
  task.offset = static_cast<const T*>(c.offset);
  task.slope = static_cast<const T*>(c.slope);
  task.start = static_cast<const T*>(c.start);
  task.best = static_cast<T*>(c.value);
  task.status = c.status;
  task.iterations = c.iterations;
  task.residual = static_cast<T*>(c.residual);
  task.rejects = c.rejects;

  const size_t rows = size_t(c.batch * c.size) * sizeof(T), slots = size_t(c.window) + 1;
  Poisoned point(rows), other(rows), last(rows), pre(rows), change(rows), product(rows);
  Poisoned f_history(rows * slots), g_history(rows * slots);
  Poisoned gram(size_t(c.batch) * slots * slots * sizeof(double));
  Poisoned samples(size_t(c.batch) * sizeof(Sample<T>)), orders(size_t(c.batch) * sizeof(Order));
  Poisoned control(sizeof(Control)), narrow_rows(rows), narrow_factor(size_t(c.size * c.size) * 4);
  task.point = point.as<T>();
  task.other = other.as<T>();
  task.last = last.as<T>();
  task.pre = pre.as<T>();
  task.change = change.as<uint16_t>();
  task.f_history = f_history.as<T>();
  task.g_history = g_history.as<T>();
  task.gram = gram.as<double>();
  task.samples = samples.as<Sample<T>>();
  task.orders = orders.as<Order>();
  task.control = control.as<Control>();
  if (c.graph) task.conditions = {true, kRamp, 1, 2, 3};

  const T* factor = static_cast<const T*>(c.factor);
  if constexpr (kRamp) {
    for (int64_t i = 0; i < c.size * c.size; ++i) {
      narrow_factor.as<T>()[i] = from_bfloat16(to_bfloat16(factor[i]));
    }
  }
  const unsigned blocks = unsigned(c.batch), threads = loop_threads(c.size, kPack);
  uint64_t seed = c.seed;
  const auto step = [&](const T* made) {
    emulate(&step_kernel<T, kPack, kRamp>, blocks, threads, LoopShared<T>::bytes(o.window), ++seed,
            task, made);
    c.skipped |= cuda_emulator::machine.skipped;
  };
  const auto exact_step = [&] {
    multiply(task, task.point, factor, product.as<T>());
    ++c.exact_products;
  };
  const auto narrow_step = [&] {
    for (int64_t i = 0; i < c.batch * c.size; ++i) {
      narrow_rows.as<T>()[i] = from_bfloat16(task.change[i]);
    }
    multiply(task, narrow_rows.as<T>(), narrow_factor.as<T>(), product.as<T>());
    ++c.narrow_products;
  };

  emulate(&start_kernel<T>, blocks, threads, 0, ++seed, task);
  if (task.start == nullptr) step(nullptr);
  if (c.graph) {
    emulate(&enter_kernel<T>, 1, 32, 0, ++seed, task);
    for (int k = 0; conditional_values[1] != 0; ++k) {
      if (k > o.max_iter) throw std::runtime_error("the loop does not end");
      if (!kRamp || conditional_values[2] != 0) exact_step();
      if (kRamp && conditional_values[3] != 0) narrow_step();
      step(product.as<T>());
    }
  } else {
    for (int k = task.start == nullptr; k <= o.max_iter; ++k) {
      exact_step();
      step(product.as<T>());
    }
  }
  if (c.value_slope != nullptr) {
    multiply(task, task.best, factor, product.as<T>());
    emulate(&slope_kernel<T>, blocks, threads, 0, ++seed, task,
            static_cast<const T*>(product.as<T>()), static_cast<T*>(c.value_slope));
  }
}

template <typename T>
void run(Call& c) {
  constexpr int kWide = 16 / sizeof(T);
  if constexpr (sizeof(T) == 4) {
    if (c.ramp) return c.pack > 1 ? solve<T, kWide, true>(c) : solve<T, 1, true>(c);
  }
  return c.pack > 1 ? solve<T, kWide, false>(c) : solve<T, 1, false>(c);
}

}  // namespace

// The reason why it failed, empty if it did not.
extern "C" const char* loop_solve_call(Call* call, int is_double) {
  static std::string message;
  message.clear();
  try {
    cuda_emulator::machine.skip = call->skip;
    is_double ? run<double>(*call) : run<float>(*call);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// One small solve, by one thread (by_warp 0) or by a warp; outcome: dropped, rejected.
extern "C" void small_solve_call(const double* gram, int slots, int slot, int count,
                                 const double* options, int by_warp, double* gamma, int* outcome) {
  const AndersonOptions o{options[0], options[1], options[2], options[3]};
  std::vector<double> work(size_t(slots) * size_t(slots));
  AndersonOutcome result{};
  if (by_warp) {
    emulate(
        [&] {
          const AndersonOutcome mine =
              solve_small_by_warp(gram, slots, slot, count, o, work.data(), gamma);
          if (threadIdx.x == 31) result = mine;
        },
        1, 32, 0, 1);
  } else {
    result = solve_small(gram, slots, 1, slots, slot, count, o, work.data(), gamma);
  }
  outcome[0] = result.dropped;
  outcome[1] = result.rejected;
}

extern "C" int round_to_bfloat16(float x) { return to_bfloat16(x); }
