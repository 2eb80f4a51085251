// One solve of a whole batch, as the operator gives it to the engine of an instruction set.
//
//   forward  z = phi(W z + c)         injection c, activation phi, start z0
//   adjoint  q = D (g + q W)          injection g, slope D, no activation, start 0
//
// Rows are samples. T is float or double; everything is (batch, size), contiguous, but the weight.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "common/sample.h"
#include "cpu/iteration_task.h"

namespace fastdeq {

class Sharing;  // threads.h

// Calls body(context, begin, end) for parts of 0 <= i < count, on several threads where that pays.
using ParallelFor = void (*)(Sharing* sharing, int64_t count, void* context,
                             void (*body)(void* context, int64_t begin, int64_t end));

template <typename T>
struct SolveTask {
  int64_t size = 0;
  int64_t batch = 0;

  // Entry (output j, input k) of the product is weight[j * output_stride + k * input_stride]; one
  // of the strides is 1.
  const T* weight = nullptr;
  int64_t output_stride = 0;
  int64_t input_stride = 0;
  const T* injection = nullptr;
  const T* slope = nullptr;  // adjoint only; null: forward
  const T* start = nullptr;  // null: zeros
  int activation = 0;        // index into activations.h; unused by the adjoint

  SolveOptions options;
  bool low_precision = false;  // early evaluations in 8 bits or bfloat16; precision_schedule.h

  T* value = nullptr;
  T* value_slope = nullptr;  // phi'(W z + c) at the value; null: not requested
  int8_t* status = nullptr;
  int32_t* iterations = nullptr;
  T* residual = nullptr;
  int32_t* rejects = nullptr;  // (batch, counters_of(solver))

  int64_t slots = 0;           // samples that a worker holds at once
  int64_t triangle_parts = 0;  // W is symmetric and read where it lies, in so many parts; 0: packed
  // W in the order in which the products read it; the last four with `low_precision`.
  T* packed = nullptr;
  uint32_t* packed_bfloat16 = nullptr;
  uint32_t* packed_int8 = nullptr;
  float* int8_scale = nullptr;     // of each output
  int32_t* int8_offset = nullptr;  // of each output: 128 times the sum of its 8-bit entries
  std::byte* scratch = nullptr;    // scratch_bytes for each worker
  std::atomic<int64_t>* next_sample = nullptr;
  ParallelFor parallel_for = nullptr;  // set where one worker's products are shared among threads
  Sharing* sharing = nullptr;

  // The first worker, on the calling thread, calls look(look_context) now and then; all end where
  // they are once `interrupted` is set. Null: a solve goes on to its end.
  void (*look)(void* context) = nullptr;
  void* look_context = nullptr;
  const std::atomic<bool>* interrupted = nullptr;
};

// The engine of one instruction set. Nothing here allocates.
template <typename T>
struct EngineFor {
  int64_t (*padded)(int64_t size);  // outputs in the packed weight
  int64_t (*panels)(int64_t size);
  void (*pack)(const SolveTask<T>& task, int64_t first_panel, int64_t last_panel);
  int64_t (*scratch_bytes)(const SolveTask<T>& task);
  // Takes samples from the common queue until none is left.
  void (*work)(const SolveTask<T>& task, int64_t worker);
  // Elementwise phi (derivative 0) or phi' (derivative 1), for tests of the vector functions.
  void (*activate)(int activation, int derivative, const T* in, T* out, int64_t count);
  // For entries begin <= j < end of a sample of a general map; see iteration_rows.h.
  void (*measure)(const RowEvaluation<T>& evaluation, int64_t begin, int64_t end, double* sums);
  void (*take_step)(const RowEvaluation<T>& evaluation, const RowStep<T>& step, int64_t begin,
                    int64_t end);
};

struct Engine {
  const char* name;
  EngineFor<float> for_float;
  EngineFor<double> for_double;
};

const Engine& engine_generic();
#if defined(FASTDEQ_HAS_AVX2)
const Engine& engine_avx2();
#endif
#if defined(FASTDEQ_HAS_AVX512)
const Engine& engine_avx512();
#endif

}  // namespace fastdeq
