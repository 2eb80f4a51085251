// Threads for a piece of work, for as long as they gain time.
//
// A parallel region of OpenMP ends when each of its threads has reached its end, also one that the
// system does not let run: beside busy processes that takes a time slice or several, 4 to 16 ms,
// for a solve of 40 us. So each region is timed. Where the caller waited for longer than the other
// threads saved it, the difference is a loss, and work of that kind and size stays on one thread
// for a multiple of it, a larger one each time until gains have made up for the losses. A busy
// machine then costs a few per cent over one thread, a quiet one nothing.

#pragma once

#include <c10/util/FunctionRef.h>

#include <atomic>
#include <cstdint>

#include "cpu/interrupt.h"

namespace fastdeq {

// Threads that work may be divided among: at::get_num_threads(); 1 within a parallel region, and in
// a process that was forked from one in which fastdeq had opened regions: another would never end.
int64_t available_threads();

// What regions for one kind and size of work have gained or lost, and when there is to be another.
class Sharing {
 public:
  // Whether a region may be opened now.
  bool is_worthwhile() const;
  // After a region: by how many nanoseconds it took longer than one thread would have; below 0 it
  // was faster.
  void report(int64_t loss);

 private:
  std::atomic<int64_t> alone_until_{0};  // on the steady clock
  std::atomic<int64_t> debt_{0};         // losses that no gain has made up for yet
  std::atomic<int64_t> multiple_{0};     // of the next loss, to stay on one thread for
};

enum class Shared : int8_t { kSamples, kProduct, kPacking, kMixing, kSymmetricPart, kIteration };

// Of the whole process, for `work` of about so many multiply-adds, by powers of four.
Sharing& sharing_of(Shared kind, double work);

// Calls body(worker) for 0 <= worker < workers, each on a thread, the first on the caller's. The
// workers divide their work by themselves, so a late one finds less of it. Meanwhile the caller
// looks for an interrupt.
void run_workers(int64_t workers, Sharing& sharing, Interrupt& interrupt,
                 c10::function_ref<void(int64_t)> body);

// While it lives, PyTorch's own matrix products of the calling thread stay on it, if `work`
// multiply-adds are not worth another one: MKL takes all threads for products of a microsecond, and
// then waits for them as above. Without MKL nothing happens.
class OneThread {
 public:
  explicit OneThread(double work);
  ~OneThread();
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_ = -1;  // the calling thread's own limit, 0: none; -1: nothing was changed
};

// Calls body(begin, end) for parts of 0 <= i < count, of at least `grain` but for the last, that
// take about the same time each.
void parallel_for(int64_t count, int64_t grain, Sharing& sharing,
                  c10::function_ref<void(int64_t, int64_t)> body);

}  // namespace fastdeq
