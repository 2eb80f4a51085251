// Products of a few rows with the packed weight, all in registers.
//
//   out[r, j] = sum_k rows[r][k] W(j, k)      r < R <= kRows,  j in a panel of V vectors
//
// W is packed into panels of V vectors of outputs: panel[k][j], so each step in k
// loads V vectors and broadcasts R numbers for R V fused multiply-adds (24 for 4 + 6 loads with
// AVX-512). In bfloat16 a step takes two k at once, panel[k / 2][j] holds the pair (k, k + 1); in
// bytes it takes four.
//
// Every output is summed in the same order whatever R is: a sample's result does not depend on
// which others it is computed with. Sums restart every kDepth terms, which keeps their rounding
// error that of kDepth terms.
//
// One thread, Zen 4 at 3.7 GHz, 48 rows: 106 (size 64) to 116 (512, 1024) GFlop/s of a peak of 118
// in float32, twice that in bfloat16, four times in bytes; MKL 2025 through torch.mm: 63 to 101.

#pragma once

#include "cpu/vector.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr int kRows = 6;
constexpr int kVectors = FASTDEQ_VECTOR_BYTES == 64 ? 4 : 2;  // 24 or 12 accumulators
constexpr int64_t kDepth = 512;

template <typename T>
constexpr int64_t kPanel = kVectors * kLanes<T>;

template <typename T>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
int64_t panels(int64_t size) {
  return (size + kPanel<T> - 1) / kPanel<T>;
}

// Vectors in the panel that starts at output j.
template <typename T>
inline int vectors_at(int64_t j, int64_t size) {
  const int64_t left = (size - j + kLanes<T> - 1) / kLanes<T>;
  return int(left < kVectors ? left : kVectors);
}

template <typename T, int R, int V>
void multiply_tile(const T* const* rows, const T* panel, int64_t size, T* out) {
  const T* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  for (int64_t begin = 0; begin < size; begin += kDepth) {
    const int64_t end = size < begin + kDepth ? size : begin + kDepth;
    Vec<T> sum[R][V] = {};
    for (int64_t k = begin; k < end; ++k) {
      Vec<T> w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = load(panel + (k * V + v) * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> z = splat<T>(row[r][k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] += z * w[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        T* at = out + r * kPanel<T> + v * kLanes<T>;
        store(at, begin == 0 ? sum[r][v] : load(at) + sum[r][v]);
      }
    }
  }
}

#if defined(FASTDEQ_LOW_PRECISION)

template <int R, int V>
void multiply_tile_bfloat16(const uint32_t* const* rows, const uint32_t* panel, int64_t size,
                            const float*, const int32_t*, float* out) {
  const uint32_t* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  const int64_t pairs = (size + 1) / 2;
  for (int64_t begin = 0; begin < pairs; begin += kDepth / 2) {
    const int64_t end = pairs < begin + kDepth / 2 ? pairs : begin + kDepth / 2;
    __m512 sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t k = begin; k < end; ++k) {
      __m512i w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = _mm512_loadu_si512(panel + (k * V + v) * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i z = _mm512_set1_epi32(int(row[r][k]));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)w[v], (__m512bh)z);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        float* at = out + r * kPanel<float> + v * 16;
        _mm512_storeu_ps(at,
                         begin == 0 ? sum[r][v] : _mm512_add_ps(_mm512_loadu_ps(at), sum[r][v]));
      }
    }
  }
}

// sum += four products of unsigned and signed bytes. GCC 12 copies and spills every sum around the
// intrinsic of this instruction, which halves the rate.
FASTDEQ_INLINE void add_dot_int8(__m512i& sum, __m512i z, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(z), "v"(w));
}

// Rows hold unsigned bytes, 128 for zero; the offset of an output takes out what that adds. Exact,
// but for the last conversion.
template <int R, int V>
void multiply_tile_int8(const uint32_t* const* rows, const uint32_t* panel, int64_t size,
                        const float* scale, const int32_t* offset, float* out) {
  const uint32_t* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  const int64_t fours = (size + 3) / 4;
  __m512i sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < fours; ++k) {
    __m512i w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = _mm512_loadu_si512(panel + (k * V + v) * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i z = _mm512_set1_epi32(int(row[r][k]));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) add_dot_int8(sum[r][v], z, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m512 s = _mm512_loadu_ps(scale + v * 16);
    const __m512i o = _mm512_loadu_si512(offset + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][v], o));
      _mm512_storeu_ps(out + r * kPanel<float> + v * 16, _mm512_mul_ps(product, s));
    }
  }
}

#endif

template <typename T>
using Tile = void (*)(const T* const*, const T*, int64_t, T*);
// A tile of low-precision products: rows, panel, size, scale and offset of the panel's outputs,
// result.
using LowTile = void (*)(const uint32_t* const*, const uint32_t*, int64_t, const float*,
                         const int32_t*, float*);

// The tile for `rows` rows, 1 to kRows, and `vectors` vectors, 1 to kVectors.
template <typename T, int R = kRows, int V = kVectors>
Tile<T> tile_for(int rows, int vectors) {
  if (rows < R) {
    if constexpr (R > 1) return tile_for<T, R - 1, V>(rows, vectors);
  }
  if (vectors < V) {
    if constexpr (V > 1) return tile_for<T, R, V - 1>(rows, vectors);
  }
  return &multiply_tile<T, R, V>;
}

#if defined(FASTDEQ_LOW_PRECISION)
template <bool kInt8, int R = kRows, int V = kVectors>
LowTile low_tile_for(int rows, int vectors) {
  if (rows < R) {
    if constexpr (R > 1) return low_tile_for<kInt8, R - 1, V>(rows, vectors);
  }
  if (vectors < V) {
    if constexpr (V > 1) return low_tile_for<kInt8, R, V - 1>(rows, vectors);
  }
  if constexpr (kInt8) return &multiply_tile_int8<R, V>;
  return &multiply_tile_bfloat16<R, V>;
}
#endif

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
