// A packed weight: the layout of its buffer, what is packed, and who packs it. That of a symmetric
// weight may be passed to solves in both directions; where it does not fit a task they pack anew.

#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/engine.h"
#include "cpu/solve_task.h"
#include "cpu/threads.h"

namespace fastdeq {

struct PackedHeader {
  uint64_t magic;
  int64_t size;
  int64_t element;  // bytes
  int64_t low_precision;
  const void* engine;
};

// From this size on low-precision products win; see docs/how-it-works.md for the measurements.
constexpr int64_t kLowPrecisionSize = 48;

template <typename T>
const EngineFor<T>& engine_for() {
  if constexpr (std::is_same_v<T, float>) {
    return engine().for_float;
  } else {
    return engine().for_double;
  }
}

// Whether solves with a packed weight have low-precision products.
template <typename T>
bool uses_low_precision(int64_t size, Precision precision) {
  return std::is_same_v<T, float> && has_low_precision() && precision != Precision::kFloat32 &&
         (precision == Precision::kMixed || size >= kLowPrecisionSize);
}

constexpr uint64_t kPackedMagic = 0x6671656474736166;  // "fastdeqf"
constexpr int64_t kPackedHeader = 64;

// Enough for every engine and dtype, and a function of the size alone, so that a tracer knows it.
inline int64_t packed_bytes(int64_t size) {
  return kPackedHeader + (size + 63) / 64 * 64 * (8 * size + 64);
}

template <typename T>
void place_packed(SolveTask<T>& task, std::byte* buffer, int64_t outputs) {
  std::byte* at = buffer + kPackedHeader;
  const auto take = [&](int64_t bytes) {
    std::byte* const taken = at;
    at += (bytes + 63) / 64 * 64;
    return static_cast<void*>(taken);
  };
  const int64_t size = task.size;
  task.packed = static_cast<T*>(take(outputs * size * int64_t(sizeof(T))));
  if (!task.low_precision) return;
  task.packed_bfloat16 = static_cast<uint32_t*>(take(outputs * ((size + 1) / 2) * 4));
  task.packed_int8 = static_cast<uint32_t*>(take(outputs * ((size + 3) / 4) * 4));
  task.int8_scale = static_cast<float*>(take(outputs * 4));
  task.int8_offset = static_cast<int32_t*>(take(outputs * 4));
}

template <typename T>
PackedHeader packed_header(const SolveTask<T>& task) {
  return {kPackedMagic, task.size, int64_t(sizeof(T)), task.low_precision, &engine()};
}

// Packs the weight where place_packed has said, on several threads if asked for.
template <typename T>
void pack_all(const SolveTask<T>& task, bool shared) {
  const EngineFor<T>& engine = engine_for<T>();
  const int64_t panels = engine.panels(task.size);
  if (!shared) {
    engine.pack(task, 0, panels);
    return;
  }
  // A panel of a few hundred inputs is worth a thread.
  parallel_for(panels, std::max<int64_t>(1, 1024 / task.size),
               sharing_of(Shared::kPacking, double(task.size) * double(task.size)),
               [&](int64_t begin, int64_t end) { engine.pack(task, begin, end); });
}

inline bool operator==(const PackedHeader& a, const PackedHeader& b) {
  return a.magic == b.magic && a.size == b.size && a.element == b.element &&
         a.low_precision == b.low_precision && a.engine == b.engine;
}

}  // namespace fastdeq
