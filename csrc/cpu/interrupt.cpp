#include "cpu/interrupt.h"

#include <chrono>

namespace fastdeq {
namespace {

constexpr int64_t kInterval = 100'000'000;  // nanoseconds between two checks

std::atomic<SignalCheck> signal_check{nullptr};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void set_signal_check(SignalCheck check) { signal_check.store(check); }

void Interrupt::look() noexcept {
  if (error_) return;
  const int64_t time = now();
  if (due_ != 0 && time < due_) return;
  const bool is_first = due_ == 0;
  due_ = time + kInterval;
  if (is_first) return;
  try {
    if (const SignalCheck check = signal_check.load()) check();
  } catch (...) {
    error_ = std::current_exception();
    requested_.store(true, std::memory_order_relaxed);
  }
}

}  // namespace fastdeq
