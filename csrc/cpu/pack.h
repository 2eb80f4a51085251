// Packs the weight into the panels that product.h reads; outputs beyond the size are zeros.

#pragma once

#include "cpu/product.h"
#include "cpu/solve_task.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

#if defined(FASTDEQ_LOW_PRECISION)

// Pairs (k, k + 1) of a packed panel of `width` outputs, rounded to bfloat16.
inline void pack_bfloat16(const float* panel, int64_t width, int64_t size, uint32_t* out) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
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

// Fours (k ... k + 3) of a packed panel, as signed bytes with a scale for each output.
inline void pack_int8(const float* panel, int64_t width, int64_t size, uint32_t* out, float* scale,
                      int32_t* offset) {
  const __m512i byte = _mm512_set1_epi32(255);
  for (int64_t j = 0; j < width; j += 16) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t k = 0; k < size; ++k) {
      largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(panel + k * width + j)));
    }
    const __m512 unit = _mm512_div_ps(largest, _mm512_set1_ps(127));
    const __mmask16 used = _mm512_cmp_ps_mask(unit, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(1), unit);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < size; k += 4) {
      __m512i four = _mm512_setzero_si512();
      for (int64_t i = 0; i < 4 && k + i < size; ++i) {
        const __m512 w = _mm512_loadu_ps(panel + (k + i) * width + j);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(w, inverse));
        sum = _mm512_add_epi32(sum, rounded);
        four = _mm512_or_si512(four, _mm512_sllv_epi32(_mm512_and_si512(rounded, byte),
                                                       _mm512_set1_epi32(int(8 * i))));
      }
      _mm512_storeu_si512(out + k / 4 * width + j, four);
    }
    _mm512_storeu_ps(scale + j, unit);
    _mm512_storeu_si512(offset + j, _mm512_slli_epi32(sum, 7));
  }
}

#endif

// a0 b0 a1 b1 ... into two vectors.
template <typename T>
FASTDEQ_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>* out) {
#if defined(__clang__)
  for (int i = 0; i < kLanes<T> / 2; ++i) {
    const int high = i + kLanes<T> / 2;
    out[0][2 * i] = a[i], out[0][2 * i + 1] = b[i];
    out[1][2 * i] = a[high], out[1][2 * i + 1] = b[high];
  }
#else
  IVec<T> low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T> / 2; ++i) {
    low[2 * i] = i, low[2 * i + 1] = i + kLanes<T>;
    high[2 * i] = i + kLanes<T> / 2, high[2 * i + 1] = i + kLanes<T> * 3 / 2;
  }
  out[0] = __builtin_shuffle(a, b, low);
  out[1] = __builtin_shuffle(a, b, high);
#endif
}

// The transpose of a square of vectors: each stage interleaves row i with row i + n / 2.
template <typename T>
FASTDEQ_INLINE void transpose(Vec<T>* rows) {
  constexpr int n = kLanes<T>;
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<T> mixed[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) interleave<T>(rows[i], rows[i + n / 2], mixed + 2 * i);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = mixed[i];
  }
}

// panel[k][j] = from[j][k] for a whole vector of outputs j.
template <typename T>
void pack_transposed(const T* from, int64_t stride, int64_t size, T* panel, int64_t width) {
  constexpr int n = kLanes<T>;
  int64_t k = 0;
  for (; k + n <= size; k += n) {
    Vec<T> rows[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) rows[j] = load(from + j * stride + k);
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store(panel + (k + i) * width, rows[i]);
  }
  for (; k < size; ++k) {
    for (int j = 0; j < n; ++j) panel[k * width + j] = from[j * stride + k];
  }
}

template <typename T>
void pack(const SolveTask<T>& task, int64_t first_panel, int64_t last_panel) {
  const int64_t size = task.size;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t begin = p * kPanel<T>;
    const int64_t width = vectors_at<T>(begin, size) * kLanes<T>;
    const int64_t used = size - begin < width ? size - begin : width;
    T* panel = task.packed + begin * size;
    const T* source = task.weight + begin * task.output_stride;
    int64_t done = 0;
    if (task.input_stride == 1) {
      for (; done + kLanes<T> <= used; done += kLanes<T>) {
        pack_transposed(source + done * task.output_stride, task.output_stride, size, panel + done,
                        width);
      }
    }
    for (int64_t k = 0; k < size; ++k) {
      const T* from = source + k * task.input_stride;
      T* to = panel + k * width;
      for (int64_t j = done; j < used; ++j) to[j] = from[j * task.output_stride];
      for (int64_t j = used; j < width; ++j) to[j] = 0;
    }
#if defined(FASTDEQ_LOW_PRECISION)
    if constexpr (sizeof(T) == 4) {
      if (task.low_precision) {
        pack_int8(panel, width, size, task.packed_int8 + begin * ((size + 3) / 4),
                  task.int8_scale + begin, task.int8_offset + begin);
        pack_bfloat16(panel, width, size, task.packed_bfloat16 + begin * ((size + 1) / 2));
      }
    }
#endif
  }
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
