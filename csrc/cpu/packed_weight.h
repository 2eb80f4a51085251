// The layout of a buffer with a packed weight, which the adjoint of a symmetric one has from the
// forward solve. Where what is in it does not fit a task it is packed anew.

#pragma once

#include "cpu/solve_task.h"

namespace fastdeq {

struct PackedHeader {
  uint64_t magic;
  int64_t size;
  int64_t element;  // bytes
  int64_t low_precision;
  const void* engine;
};

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
PackedHeader packed_header(const SolveTask<T>& task, const void* engine) {
  return {kPackedMagic, task.size, int64_t(sizeof(T)), task.low_precision, engine};
}

inline bool operator==(const PackedHeader& a, const PackedHeader& b) {
  return a.magic == b.magic && a.size == b.size && a.element == b.element &&
         a.low_precision == b.low_precision && a.engine == b.engine;
}

}  // namespace fastdeq
