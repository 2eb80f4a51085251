#include "cpu/threads.h"

#include <ATen/Parallel.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <ctime>
#include <thread>

// In libtorch_cpu where that is built with MKL.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int);

namespace fastdeq {
namespace {

// Multiply-adds that one thread does in about 20 us.
constexpr double kWorkOfOne = 1e6;

// Multiples of a loss: 8 means that, at first, a late thread costs at most an eighth more than one
// thread takes, 64 that a machine which stays busy costs 1.6 %.
constexpr int64_t kFirstMultiple = 8;
constexpr int64_t kMostMultiple = 64;
constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kLongestAlone = 2000 * kMillisecond;
constexpr int64_t kMostDebt = 50 * kMillisecond;

// The caller waits for other threads with the processor at first, as long as waking it would take;
// then it lets others run, and at last it sleeps, for parts of the time that it has waited.
constexpr int64_t kSpin = 20'000;
constexpr int64_t kYield = 5 * kMillisecond;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Time that the calling thread has had a processor.
int64_t processor_time() {
  std::timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void await(const std::atomic<int64_t>& running, Interrupt& interrupt) {
  const int64_t begin = now();
  while (running.load(std::memory_order_acquire) > 0) {
    const int64_t waited = now() - begin;
    if (waited < kSpin) continue;
    if (waited < kYield) {
      std::this_thread::yield();
    } else {
      interrupt.look();
      std::this_thread::sleep_for(
          std::chrono::nanoseconds(std::min(waited / 64, 10 * kMillisecond)));
    }
  }
}

// OpenMP's threads do not survive a fork, and GCC's runtime waits for them all the same.
std::atomic<bool> threads_are_lost{false};

void note_region() {
#if !defined(_WIN32)
  [[maybe_unused]] static const int registered =
      pthread_atfork(nullptr, nullptr, [] { threads_are_lost.store(true); });
#endif
}

}  // namespace

int64_t available_threads() {
#if defined(_OPENMP)
  if (threads_are_lost.load(std::memory_order_relaxed) || at::in_parallel_region()) return 1;
  return at::get_num_threads();
#else
  return 1;  // at::parallel_for is serial here
#endif
}

bool Sharing::is_worthwhile() const {
  const int64_t until = alone_until_.load(std::memory_order_relaxed);
  return until == 0 || now() >= until;
}

// Threads may report at the same time; one of the reports may then get lost, which does no harm.
void Sharing::report(int64_t loss) {
  constexpr auto relaxed = std::memory_order_relaxed;
  const int64_t debt = debt_.load(relaxed);
  if (loss <= 0) {
    if (debt == 0) return;
    debt_.store(std::max<int64_t>(0, debt + loss), relaxed);
    if (debt + loss <= 0) multiple_.store(kFirstMultiple, relaxed);
    return;
  }
  const int64_t multiple = std::max(kFirstMultiple, multiple_.load(relaxed));
  debt_.store(std::min(kMostDebt, debt + loss), relaxed);
  multiple_.store(std::min(kMostMultiple, 2 * multiple), relaxed);
  alone_until_.store(now() + std::min(kLongestAlone, multiple * loss), relaxed);
}

Sharing& sharing_of(Shared kind, double work) {
  constexpr int kKinds = 6, kSizes = 24;
  static std::array<std::array<Sharing, kSizes>, kKinds> all;
  return all[size_t(kind)][size_t(std::clamp(std::ilogb(work) / 2, 0, kSizes - 1))];
}

OneThread::OneThread(double work) {
  if (work < kWorkOfOne && MKL_Set_Num_Threads_Local != nullptr) {
    before_ = MKL_Set_Num_Threads_Local(1);
  }
}

OneThread::~OneThread() {
  if (before_ >= 0) MKL_Set_Num_Threads_Local(before_);
}

void run_workers(int64_t workers, Sharing& sharing, Interrupt& interrupt,
                 c10::function_ref<void(int64_t)> body) {
  std::atomic<int64_t> running{0}, helped{0};
  int64_t own_end = 0;
  note_region();
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) {  // the caller
      for (int64_t worker = 0; worker < end; ++worker) body(worker);
      own_end = now();
      await(running, interrupt);
      return;
    }
    running.fetch_add(1, std::memory_order_relaxed);
    const int64_t start = processor_time();
    for (int64_t worker = begin; worker < end; ++worker) body(worker);
    helped.fetch_add(processor_time() - start, std::memory_order_relaxed);
    running.fetch_sub(1, std::memory_order_release);
  });
  // Alone, the caller would have done what the others did instead of waiting.
  sharing.report(now() - own_end - helped.load(std::memory_order_relaxed));
}

void parallel_for(int64_t count, int64_t grain, Sharing& sharing,
                  c10::function_ref<void(int64_t, int64_t)> body) {
  if (count <= grain || available_threads() == 1 || !sharing.is_worthwhile()) {
    if (count > 0) body(0, count);
    return;
  }
  note_region();
  const int64_t start = now();
  int64_t own_end = start, own = count;
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
    if (begin == 0) {
      own_end = now();
      own = end;
    }
  });
  sharing.report(now() - start - (own_end - start) * count / own);
}

}  // namespace fastdeq
