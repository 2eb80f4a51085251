// Ends a long solve when Python has a signal to handle: Ctrl-C, most of all.
//
// Python handles signals between two of its own instructions, and a solve is one. So the thread
// that called a solve asks Python every tenth of a second. If the handler raises, workers stop
// where they are and the operator throws what it raised.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace fastdeq {

// Has Python handle the signals of the calling thread, and throws what a handler raises. Set by
// module.cpp, so that nothing else knows of Python.
using SignalCheck = void (*)();
void set_signal_check(SignalCheck check);

// Of one solve. Only the thread that called it looks.
class Interrupt {
 public:
  // Checks for signals if that is due, which reads a clock; never throws.
  void look() noexcept;
  // Whether a handler has raised: the workers are to stop.
  const std::atomic<bool>& requested() const { return requested_; }
  // Throws what the handler raised, if one did.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  int64_t due_ = 0;  // when the next check is; 0: nobody has looked yet
  std::atomic<bool> requested_{false};
  std::exception_ptr error_;
};

}  // namespace fastdeq
