// The history of an iteration of a general map: values and residuals of the evaluations before,
// each (B, n), as many as any sample needs, in memory that is taken then.
//
// A sample has a list of places, newest evaluation first. The next one goes to a new place where
// the history grows, and else to the last of the list, whose evaluation is not needed any more.

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
      : window_(window),
        batch_(batch),
        size_(size),
        held_(size_t(batch)),
        places_(size_t(batch * window)) {}

  int64_t held(int64_t b) const { return held_[size_t(b)]; }

  // Makes room for `needed` places, at most `window`.
  void reserve(int64_t needed, const at::TensorOptions& options) {
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

  // States (B, n) with that of sample b, so many evaluations ago, 1 or more.
  T* value(int64_t b, int64_t age) const { return values_[place(b, age - 1)]; }
  T* residual(int64_t b, int64_t age) const { return residuals_[place(b, age - 1)]; }

  // Where the newest evaluation of sample b goes when `count` are kept with it.
  T* next_value(int64_t b, int64_t count) const { return values_[next(b, count)]; }
  T* next_residual(int64_t b, int64_t count) const { return residuals_[next(b, count)]; }
  // It is there.
  void enter(int64_t b, int64_t count) {
    const int32_t newest = int32_t(next(b, count));
    int32_t& held = held_[size_t(b)];
    held = std::max(held, int32_t(count));
    int32_t* const list = places_.data() + b * window_;
    std::copy_backward(list, list + held - 1, list + held);
    list[0] = newest;
  }

 private:
  size_t place(int64_t b, int64_t i) const { return size_t(places_[size_t(b * window_ + i)]); }
  size_t next(int64_t b, int64_t count) const {
    const int64_t held = held_[size_t(b)];
    return count > held ? size_t(held) : place(b, held - 1);
  }

  const int64_t window_, batch_, size_;
  std::vector<int32_t> held_, places_;
  std::vector<at::Tensor> memory_;
  std::vector<T*> values_, residuals_;
};

}  // namespace fastdeq
