// The precision ramp: which evaluations of a line are made with narrow products. In the terms of
// Krylov methods, low precision with reliable updates (residual replacement): G. Sleijpen and H.
// van der Vorst, Computing 56 (1996) 141; M. Clark et al., Comput. Phys. Commun. 181 (2010) 1517.
//
// A narrow evaluation adds W (point - previous point) to the pre-activation, both factors rounded
// to bytes or to bfloat16. The rounding error is relative to the change, so it shrinks with the
// iteration: next to a last evaluation in full precision, the anchor, at residual r, residuals are
// off by about 1.4e-2 r with bytes and 2e-3 r with bfloat16, on normally distributed numbers. After
// a drop to where that is felt the next evaluation is made in full precision. Only those are
// verified: only they can end a solve or bring a new best iterate, so no reported residual has a
// narrow product in it.
//
// Lines without acceleration take bytes, accelerated ones, whose history compares evaluations,
// bfloat16. A line for which bytes prove too coarse (outliers in a row of W, or in the change,
// spoil the common scale) goes on in bfloat16, one that gets nowhere in full precision.

#pragma once

#include "line.h"

namespace fastdeq {
namespace FASTDEQ_TARGET {

constexpr double kDropBytes = 30, kDropBfloat16 = 400, kDropAccelerated = 30;
constexpr int kLongestNarrow = 25;  // evaluations between the anchors of an accelerated line

template <typename T>
Kind narrow_kind(const Line<T>& line) {
  return line.narrowest == Kind::kBytes && !line.plain ? Kind::kBfloat16 : line.narrowest;
}

// After an evaluation in full precision: the next anchor, equal drops on the way to the tolerance.
template <typename T>
void anchor(const SolveTask<T>& task, Line<T>& line, double relative) {
  if (line.since_anchor > 0 && __builtin_isfinite(line.goal)) {
    if (!(relative <= 0.5 * line.anchor)) {
      line.narrowest = Kind::kExact;
    } else if (line.narrowest == Kind::kBytes && relative > 1.5 * line.expected) {
      line.narrowest = Kind::kBfloat16;
    }
  }
  line.anchor = relative;
  line.since_anchor = 0;
  const double largest = !line.plain                         ? kDropAccelerated
                         : narrow_kind(line) == Kind::kBytes ? kDropBytes
                                                             : kDropBfloat16;
  const double target = 0.97 * task.tol;
  double drop = largest;
  if (target > 0 && relative > target) {
    const double total = __builtin_log(relative / target);
    drop = __builtin_exp(total / __builtin_ceil(total / __builtin_log(largest)));
  }
  line.goal = relative / drop;
}

// How the next evaluation is to be made; `relative` belongs to the one just made.
template <typename T>
Kind next_kind(const SolveTask<T>& task, Line<T>& line, double relative) {
  double rate = 0.9;  // unknown
  if (line.plain) {
    if (__builtin_isfinite(line.previous_norm)) rate = line.norm / line.previous_norm;
  } else if (line.since_anchor > 0) {
    rate = __builtin_pow(relative / line.anchor, 1.0 / line.since_anchor);
  }
  line.expected = relative * rate;
  if (line.iterations + 1 >= task.max_iter) return Kind::kExact;
  if (line.plain ? !(rate <= 0.98) : !(rate < 1)) return Kind::kExact;  // not getting on, or NaN
  if (!line.plain && (line.since_anchor >= kLongestNarrow || line.count == 0)) {
    return Kind::kExact;  // a step taken back is a large change
  }
  return line.expected > line.goal ? narrow_kind(line) : Kind::kExact;
}

#if defined(FASTDEQ_RAMP)

// Rounds a - b, or a where b is null, to the line's `change`; `most` is its largest entry, or
// negative where that is not known.
inline void round_change(Line<float>& line, Kind kind, const float* a, const float* b, int64_t size,
                         float most) {
  const int64_t padded = round_up<float>(size);
  const auto change = [=](int64_t j) {
    return b == nullptr ? load(a + j) : load(a + j) - load(b + j);
  };
  if (kind == Kind::kBfloat16) {
    line.change_scale = 1;
    auto* to = reinterpret_cast<uint16_t*>(line.change);
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
    float lanes[16];
    _mm512_storeu_ps(lanes, largest);
    most = 0;
    for (const float lane : lanes) most = lane > most ? lane : most;
  }
  line.change_scale = most / 127;
  const float inverse = line.change_scale > 0 ? 1 / line.change_scale : 0;
  const __m512i zero = _mm512_set1_epi32(128);
  for (int64_t j = 0; j < padded; j += 16) {
    const __m512i rounded = _mm512_cvtps_epi32((__m512)(change(j) * splat<float>(inverse)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(line.change + j),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
}

#endif

// Rounds a - b, or a without b, for the next evaluation; see round_change.
template <typename T>
void round_next(const SolveTask<T>& task, Line<T>& line, const T* a, const T* b, float most) {
#if defined(FASTDEQ_RAMP)
  if constexpr (sizeof(T) == 4) round_change(line, line.next, a, b, task.size, most);
#endif
}

// The largest entry of the change that narrow evaluations in place have made.
template <typename T>
float largest_change(const SolveTask<T>& task, const Line<T>& line) {
  double largest = 0;
  for (int64_t panel = 0; panel < panels<T>(task.size); ++panel) {
    const double one = line.sums[kSums * panel + 2];
    largest = one > largest ? one : largest;
  }
  return float(largest);
}

}  // namespace FASTDEQ_TARGET
}  // namespace fastdeq
