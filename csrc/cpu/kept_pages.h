// Pages that the C library keeps for the next allocation.
//
// Between two steps a cell allocates and frees intermediate tensors of some states each. glibc maps
// blocks above a threshold anew each time, and returns the free end of its heap to the system above
// another one: 128 KiB at first, where each page that comes back costs a page fault and is cleared,
// a quarter to half a microsecond for 4 KiB. A convolution of 2.3 ms took 930 faults, 1 ms, per
// evaluation. Both thresholds follow the largest mapped block that the process has freed so far (up
// to 32 MiB), which in most programs is large; here one is made and freed, and never touched, so
// that this does not depend on what ran before. What the user has set by mallopt or the environment
// stays.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace fastdeq {

// So many states a cell allocates at once at most, and those of a history.
constexpr int64_t kStatesInUse = 16;
// glibc's thresholds follow no larger blocks.
constexpr int64_t kLargestFollowed = (int64_t(32) << 20) - 65536;

// For a solve with states of so many bytes. Larger ones are mapped anew each time in any case.
inline void keep_pages_for([[maybe_unused]] int64_t bytes) {
#if defined(__GLIBC__)
  static std::atomic<int64_t> most{0};
  const int64_t wanted = std::min(kStatesInUse * bytes, kLargestFollowed);
  if (bytes > kLargestFollowed || wanted <= most.load(std::memory_order_relaxed)) return;
  most.store(wanted, std::memory_order_relaxed);
  void* volatile block = std::malloc(size_t(wanted));  // volatile: not to be optimised away
  std::free(block);
#endif
}

}  // namespace fastdeq
