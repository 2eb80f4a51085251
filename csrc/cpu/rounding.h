// Rounds the change of a slot's point to 8 bits or to bfloat16, for the next low-precision product.
//
// The point moves by what the product multiplies, the rounded change. So nothing is lost: what
// rounding leaves behind is part of the next residual, and with it of the next change, and of the
// errors of a run of low-precision evaluations only that of W adds up.

#pragma once

#include "cpu/slot.h"
#include "cpu/sums.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

template <typename T>
#if defined(FASTDEQ_LOW_PRECISION)
constexpr bool kHasLowPrecision = sizeof(T) == 4;
#else
constexpr bool kHasLowPrecision = false;
#endif

#if defined(FASTDEQ_LOW_PRECISION)

// Of the largest change that is to be in range.
inline float scale_for(float largest) { return largest / 127; }

// Sixteen changes at a time: writes them, rounded, and returns what they are then.
class Rounding {
 public:
  Rounding(bool int8, float scale, std::byte* to)
      : int8_(int8),
        scale_(splat<float>(scale)),
        inverse_(splat<float>(scale >= kLeastScale ? 1 / scale : 0)),
        to_(to) {}

  FASTDEQ_INLINE Vec<float> operator()(Vec<float> change, int64_t j) const {
    if (int8_) {
      // Adding this rounds to an integer and leaves it, plus 128, in the low byte.
      constexpr float zero = 0x1.8p23f + 128;
      const Vec<float> sum = change * inverse_ + zero;
      const Vec<float> bounded = min(max(sum, zero - 127), zero + 127);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to_ + j), _mm512_cvtepi32_epi8((__m512i)bounded));
      return (bounded - zero) * scale_;
    }
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)change);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_ + 2 * j), rounded);
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
  }

 private:
  static constexpr float kLeastScale = 0x1p-125f;  // its inverse is finite
  const bool int8_;
  const Vec<float> scale_, inverse_;
  std::byte* const to_;
};

// Rounds the change from `at` to the slot's point, or the point itself where `at` is null. The
// change, in `last` too where that is not null, becomes the rounded one.
inline void round_row(Slot<float>& slot, const float* at, float* last, int64_t size) {
  const int64_t padded = round_up<float>(size);
  const bool int8 = slot.schedule.next == Products::kInt8;
  float* const point = slot.point;
  const auto change = [=](int64_t j) {
    return at == nullptr ? load(point + j) : load(point + j) - load(at + j);
  };
  slot.change_scale = 1;
  if (int8) {
    Vec<float> largest = {};
    for (int64_t j = 0; j < padded; j += 16) largest = max(largest, abs(change(j)));
    slot.change_scale = slot.next_scale = scale_for(largest_lane<float>(largest));
  }
  const Rounding round(int8, slot.change_scale, slot.change);
  for (int64_t j = 0; j < padded; j += 16) {
    const Vec<float> rounded = round(change(j), j);
    if (at != nullptr) store(point + j, load(at + j) + rounded);
    if (last != nullptr) store(last + j, rounded);
  }
}

#endif

// For the next evaluation, in low precision: rounds the change from `at`, where the last one was,
// to the point, or without `at` the point.
template <typename T>
void round_next(const SolveTask<T>& task, Slot<T>& slot, const T* at) {
#if defined(FASTDEQ_LOW_PRECISION)
  if constexpr (kHasLowPrecision<T>) {
    const bool heavy = at != nullptr && task.options.begins_with_momentum();
    round_row(slot, at, heavy ? slot.last : nullptr, task.size);
  }
#endif
}

// The same after an evaluation whose epilogue has rounded the change. The largest of the changes,
// before they were rounded, gives the scale of those to come: they are to become smaller, and what
// is out of range waits for the change after.
template <typename T>
void take_rounded(const SolveTask<T>& task, Slot<T>& slot) {
#if defined(FASTDEQ_LOW_PRECISION)
  if constexpr (kHasLowPrecision<T>) {
    swap(slot.change, slot.next_change);
    if (slot.schedule.next != Products::kInt8) return;
    Vec<T> largest = {};
    for (int64_t panel = 0; panel < panels<T>(task.size); ++panel) {
      largest = max(largest, load(sums_of(slot, panel) + 2 * kLanes<T>));
    }
    slot.change_scale = slot.next_scale;
    slot.next_scale = scale_for(largest_lane<T>(largest));
  }
#endif
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
