// One engine of csrc/cpu behind functions of C, for instruction sets that the extension may lack.
//
// Compiled with a target_*.cpp and -DENGINE=engine_avx2, say; ctypes calls it. The work is that of
// csrc/cpu/solve_affine.cpp with one worker.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "cpu/solve_task.h"

namespace {

template <typename T>
const fastdeq::EngineFor<T>& engine() {
  if constexpr (sizeof(T) == 4) {
    return fastdeq::ENGINE().for_float;
  } else {
    return fastdeq::ENGINE().for_double;
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> aligned(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
}

template <typename T>
void activate(int activation, int derivative, const T* in, T* out, int64_t count) {
  engine<T>().activate(activation, derivative, in, out, count);
}

// Forward where slope is null, adjoint otherwise; weight (size, size), rows (batch, size).
template <typename T>
void picard(int64_t size, int64_t batch, const T* weight, const T* rows, const T* slope,
            int activation, double tol, int64_t max_iter, T* value, T* value_slope, int8_t* status,
            int32_t* iterations, T* residual) {
  fastdeq::SolveTask<T> task;
  task.size = size;
  task.batch = batch;
  task.weight = weight;
  task.output_stride = slope == nullptr ? size : 1;
  task.input_stride = slope == nullptr ? 1 : size;
  task.injection = rows;
  task.slope = slope;
  task.activation = activation;
  task.options.tol = tol;
  task.options.max_iter = int32_t(max_iter);
  task.value = value;
  task.value_slope = slope == nullptr ? value_slope : nullptr;
  task.status = status;
  task.iterations = iterations;
  task.residual = residual;
  task.slots = batch < 4 ? batch : 4;
  const int64_t outputs = (size + 63) / 64 * 64;  // no panel has more padding
  const auto packed = aligned(outputs * size * int64_t(sizeof(T)));
  const auto scratch = aligned(engine<T>().scratch_bytes(task));
  std::atomic<int64_t> next_sample{0};
  task.packed = static_cast<T*>(packed.get());
  task.scratch = static_cast<std::byte*>(scratch.get());
  task.next_sample = &next_sample;
  engine<T>().pack(task, 0, engine<T>().panels(size));
  engine<T>().work(task, 0);
}

}  // namespace

extern "C" {

const char* engine_name() { return fastdeq::ENGINE().name; }

void activate_float(int activation, int derivative, const float* in, float* out, int64_t count) {
  activate(activation, derivative, in, out, count);
}

void activate_double(int activation, int derivative, const double* in, double* out, int64_t count) {
  activate(activation, derivative, in, out, count);
}

void picard_float(int64_t size, int64_t batch, const float* weight, const float* rows,
                  const float* slope, int activation, double tol, int64_t max_iter, float* value,
                  float* value_slope, int8_t* status, int32_t* iterations, float* residual) {
  picard(size, batch, weight, rows, slope, activation, tol, max_iter, value, value_slope, status,
         iterations, residual);
}

void picard_double(int64_t size, int64_t batch, const double* weight, const double* rows,
                   const double* slope, int activation, double tol, int64_t max_iter, double* value,
                   double* value_slope, int8_t* status, int32_t* iterations, double* residual) {
  picard(size, batch, weight, rows, slope, activation, tol, max_iter, value, value_slope, status,
         iterations, residual);
}

}  // extern "C"
