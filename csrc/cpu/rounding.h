// Rounds the change of a slot's point to 8 bits or to bfloat16, for the next low-precision product.

#pragma once

#include "cpu/slot.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

#if defined(FASTDEQ_LOW_PRECISION)

// Rounds a - b, or a where b is null, to the slot's `change`; `most` is its largest entry, or
// negative where that is not known.
inline void round_change(Slot<float>& slot, Products products, const float* a, const float* b,
                         int64_t size, float most) {
  const int64_t padded = round_up<float>(size);
  const auto change = [=](int64_t j) {
    return b == nullptr ? load(a + j) : load(a + j) - load(b + j);
  };
  if (products == Products::kBfloat16) {
    slot.change_scale = 1;
    auto* to = reinterpret_cast<uint16_t*>(slot.change);
    for (int64_t j = 0; j < padded; j += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                          (__m256i)_mm512_cvtneps_pbh((__m512)change(j)));
    }
    return;
  }
  if (most < 0) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 16) {
      largest = _mm512_max_ps(largest, _mm512_abs_ps((__m512)change(j)));
    }
    most = largest_lane<float>((Vec<float>)largest);
  }
  slot.change_scale = most / 127;
  const float inverse = slot.change_scale > 0 ? 1 / slot.change_scale : 0;
  const __m512i zero = _mm512_set1_epi32(128);
  for (int64_t j = 0; j < padded; j += 16) {
    const __m512i rounded = _mm512_cvtps_epi32((__m512)(change(j) * splat<float>(inverse)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(slot.change + j),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
}

#endif

// Rounds a - b, or a without b, for the next evaluation; see round_change.
template <typename T>
void round_next(const SolveTask<T>& task, Slot<T>& slot, const T* a, const T* b, float most) {
#if defined(FASTDEQ_LOW_PRECISION)
  if constexpr (sizeof(T) == 4) round_change(slot, slot.schedule.next, a, b, task.size, most);
#endif
}

// The largest entry of the change of low-precision evaluations in place.
template <typename T>
float largest_change(const SolveTask<T>& task, const Slot<T>& slot) {
  Vec<T> largest = {};
  for (int64_t panel = 0; panel < panels<T>(task.size); ++panel) {
    largest = max(largest, load(sums_of(slot, panel) + 2 * kLanes<T>));
  }
  return float(largest_lane<T>(largest));
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
