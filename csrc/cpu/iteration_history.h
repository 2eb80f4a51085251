// The history of an iteration of a general map: values and residuals of the evaluations before, in
// a ring of `window` entries, each (B, n), whose memory is taken when it is first needed.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace fastdeq {

// Up to so many numbers, memory for all entries is taken at once: an allocation takes as long as a
// small step.
constexpr int64_t kSmallHistory = 65536;

template <typename T>
class History {
 public:
  History(int64_t window, int64_t batch, int64_t size)
      : window_(window), batch_(batch), size_(size) {}

  // Makes room for the first `needed` entries, of at most `window`.
  void reserve(int64_t needed, const at::TensorOptions& options) {
    needed = std::min(needed, window_);
    while (int64_t(values_.size()) < needed) {
      const int64_t more = batch_ * size_ * window_ <= kSmallHistory ? window_ : 1;
      memory_.push_back(at::empty({2 * more, batch_, size_}, options));
      T* const from = memory_.back().template mutable_data_ptr<T>();
      for (int64_t i = 0; i < 2 * more; i += 2) {
        values_.push_back(from + i * batch_ * size_);
        residuals_.push_back(from + (i + 1) * batch_ * size_);
      }
    }
  }

  // Of sample b, for its evaluation of this number, counted from those that entered the history.
  T* value(int64_t b, int64_t evaluation) const { return at(values_, b, evaluation); }
  T* residual(int64_t b, int64_t evaluation) const { return at(residuals_, b, evaluation); }

 private:
  T* at(const std::vector<T*>& entries, int64_t b, int64_t evaluation) const {
    return entries[size_t(evaluation % window_)] + b * size_;
  }

  const int64_t window_, batch_, size_;
  std::vector<at::Tensor> memory_;
  std::vector<T*> values_, residuals_;
};

}  // namespace fastdeq
