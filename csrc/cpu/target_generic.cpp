// The engine for any machine that the compiler's default target supports.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/activation_names.h"
#include "cpu/solve_task.h"

#define FASTDEQ_TARGET generic
#define FASTDEQ_VECTOR_BYTES 16
#include "cpu/worker.h"

namespace fastdeq {

const Engine& engine_generic() {
  static constexpr Engine engine{"generic", generic::engine_for<float>(),
                                 generic::engine_for<double>()};
  return engine;
}

}  // namespace fastdeq
