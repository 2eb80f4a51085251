// Packs the weight into the panels that product.h reads; outputs beyond the size are zeros.

#pragma once

#include "product.h"
#include "solve_task.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
int64_t packed_size(int64_t size) {
  return round_up<T>(size) * size;
}

template <typename T>
int64_t panels(int64_t size) {
  return (size + kPanel<T> - 1) / kPanel<T>;
}

#if defined(FASTDEQ_BFLOAT16)

// Pairs (k, k + 1) of a packed panel of `width` outputs, rounded to bfloat16.
inline void pack_low(const float* panel, int64_t width, int64_t size, uint32_t* out) {
  const __m512i interleave = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
      23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t k = 0; k < size; k += 2) {
    for (int64_t j = 0; j < width; j += 16) {
      const __m512 even = _mm512_loadu_ps(panel + k * width + j);
      const __m512 odd =
          k + 1 < size ? _mm512_loadu_ps(panel + (k + 1) * width + j) : _mm512_setzero_ps();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      _mm512_storeu_si512(out + k / 2 * width + j, _mm512_permutexvar_epi16(interleave, both));
    }
  }
}

#endif

template <typename T>
void pack(const SolveTask<T>& task, int64_t first_panel, int64_t last_panel) {
  const int64_t size = task.size;
  constexpr int64_t kBlock = 64;  // inputs read at once where the weight runs along them
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t begin = p * kPanel<T>;
    const int64_t width = vectors_at<T>(begin, size) * kLanes<T>;
    const int64_t used = size - begin < width ? size - begin : width;
    T* panel = task.packed + begin * size;
    const T* source = task.weight + begin * task.output_stride;
    if (task.output_stride == 1) {
      for (int64_t k = 0; k < size; ++k) {
        const T* from = source + k * task.input_stride;
        T* to = panel + k * width;
        for (int64_t j = 0; j < used; ++j) to[j] = from[j];
        for (int64_t j = used; j < width; ++j) to[j] = 0;
      }
    } else {
      for (int64_t k0 = 0; k0 < size; k0 += kBlock) {
        const int64_t k1 = size < k0 + kBlock ? size : k0 + kBlock;
        for (int64_t j = 0; j < width; ++j) {
          const T* from = source + j * task.output_stride;
          if (j < used) {
            for (int64_t k = k0; k < k1; ++k) panel[k * width + j] = from[k];
          } else {
            for (int64_t k = k0; k < k1; ++k) panel[k * width + j] = 0;
          }
        }
      }
    }
#if defined(FASTDEQ_BFLOAT16)
    if constexpr (sizeof(T) == 4) {
      if (task.ramp) {
        pack_low(panel, width, size,
                 static_cast<uint32_t*>(task.packed_low) + begin * ((size + 1) / 2));
      }
    }
#endif
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
