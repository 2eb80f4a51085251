// One evaluation of several lines: the products, panel by panel, each followed by its epilogue.

#pragma once

#include "epilogue.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
struct Evaluation {
  const SolveTask<T>& task;
  Line<T>* const* lines;
  const void* const* rows;  // of each line, in the form that the kind of product takes
  int64_t count;
  Kind kind;
  Epilogue<T> epilogue;
};

// `count` rows, at most kRows, times the panel that starts at output j.
template <typename T>
void multiply(const SolveTask<T>& task, Kind kind, const void* const* rows, int count, int64_t j,
              T* product) {
  const int64_t size = task.size;
  const int vectors = vectors_at<T>(j, size);
  if (kind == Kind::kExact) {
    tile_for<T>(count, vectors)(reinterpret_cast<const T* const*>(rows), task.packed + j * size,
                                size, product);
    return;
  }
#if defined(FASTDEQ_RAMP)
  if constexpr (sizeof(T) == 4) {
    const bool bytes = kind == Kind::kBytes;
    const NarrowTile tile =
        bytes ? narrow_tile_for<true>(count, vectors) : narrow_tile_for<false>(count, vectors);
    const uint32_t* panel = bytes ? task.packed_bytes + j * ((size + 3) / 4)
                                  : task.packed_bfloat16 + j * ((size + 1) / 2);
    tile(reinterpret_cast<const uint32_t* const*>(rows), panel, size, task.byte_scale + j,
         task.byte_offset + j, product);
  }
#endif
}

// `context` is an Evaluation; panels may be evaluated on different threads.
template <typename T>
void evaluate_panels(void* context, int64_t first_panel, int64_t last_panel) {
  const Evaluation<T>& e = *static_cast<const Evaluation<T>*>(context);
  const int64_t size = e.task.size;
  alignas(64) T product[kRows * kPanel<T>];
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t j = panel * kPanel<T>;
    const int64_t end = size < j + kPanel<T> ? size : j + kPanel<T>;
    for (int64_t i = 0; i < e.count; i += kRows) {
      const int count = int(e.count - i < kRows ? e.count - i : kRows);
      multiply(e.task, e.kind, e.rows + i, count, j, product);
      for (int r = 0; r < count; ++r) {
        e.epilogue(e.task, *e.lines[i + r], product + r * kPanel<T>, j, end);
      }
    }
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
