// One evaluation of several slots: the products, panel by panel, each followed by its epilogue.

#pragma once

#include "cpu/epilogue.h"
#include "cpu/triangle.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
struct Evaluation {
  const SolveTask<T>& task;
  Slot<T>* const* slots;
  const void* const* rows;  // of each slot, in the precision of the products
  int64_t count;
  Products products;
  Epilogue<T> epilogue;
};

// `count` rows, at most kRows, times the panel that starts at output j.
template <typename T>
void multiply(const SolveTask<T>& task, Products products, const void* const* rows, int count,
              int64_t j, T* product) {
  const int64_t size = task.size;
  const int vectors = vectors_at<T>(j, size);
  if (products == Products::kFull) {
    tile_for<T>(count, vectors)(reinterpret_cast<const T* const*>(rows), task.packed + j * size,
                                size, product);
    return;
  }
#if defined(FASTDEQ_LOW_PRECISION)
  if constexpr (sizeof(T) == 4) {
    const bool int8 = products == Products::kInt8;
    const LowTile tile =
        int8 ? low_tile_for<true>(count, vectors) : low_tile_for<false>(count, vectors);
    const uint32_t* panel = int8 ? task.packed_int8 + j * ((size + 3) / 4)
                                 : task.packed_bfloat16 + j * ((size + 1) / 2);
    tile(reinterpret_cast<const uint32_t* const*>(rows), panel, size, task.int8_scale + j,
         task.int8_offset + j, product);
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
      multiply(e.task, e.products, e.rows + i, count, j, product);
      for (int r = 0; r < count; ++r) {
        e.epilogue(e.task, *e.slots[i + r], product + r * kPanel<T>, j, end);
      }
    }
  }
}

// The same with the triangle of a symmetric weight: parts of the product, then what follows it.
template <typename T>
struct TriangleEvaluation {
  const SolveTask<T>& task;
  Slot<T>* const* slots;
  const void* const* rows;
  int64_t count;  // at most kTriangleRows
  Epilogue<T> epilogue;
  T* products;  // (parts, count, stride)
};

template <typename T>
void evaluate_triangle_parts(void* context, int64_t first, int64_t last) {
  const auto& e = *static_cast<const TriangleEvaluation<T>*>(context);
  const int64_t size = e.task.size, stride = stride_of<T>(size), parts = e.task.triangle_parts;
  const int64_t row_stride = e.task.input_stride == 1 ? e.task.output_stride : e.task.input_stride;
  for (int64_t part = first; part < last; ++part) {
    T* products[kTriangleRows];
    for (int64_t i = 0; i < e.count; ++i) {
      products[i] = e.products + (part * e.count + i) * stride;
      for (int64_t j = 0; j < stride; ++j) products[i][j] = 0;
    }
    const auto multiply = e.count == 1 ? &multiply_triangle<T, 1> : &multiply_triangle<T, 2>;
    multiply(e.task.weight, row_stride, size, triangle_row(size, part, parts),
             triangle_row(size, part + 1, parts), reinterpret_cast<const T* const*>(e.rows),
             products);
  }
}

template <typename T>
void evaluate_triangle(TriangleEvaluation<T> e) {
  const int64_t size = e.task.size, stride = stride_of<T>(size), parts = e.task.triangle_parts;
  if (parts > 1) {
    e.task.parallel_for(e.task.sharing, parts, &e, &evaluate_triangle_parts<T>);
  } else {
    evaluate_triangle_parts<T>(&e, 0, 1);
  }
  for (int64_t i = 0; i < e.count; ++i) {
    T* const product = e.products + i * stride;
    for (int64_t part = 1; part < parts; ++part) {
      const T* const more = e.products + (part * e.count + i) * stride;
      for (int64_t j = 0; j < size; j += kLanes<T>) {
        store(product + j, load(product + j) + load(more + j));
      }
    }
    for (int64_t j = 0; j < size; j += kPanel<T>) {
      e.epilogue(e.task, *e.slots[i], product + j, j, size < j + kPanel<T> ? size : j + kPanel<T>);
    }
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
