// A stream per thread and device for work that is captured: the default stream cannot be captured,
// and a stream of PyTorch's pool may be in use by a capture of somebody else's.
//
//   const ForkedStream forked(device);   // what the current stream has been given comes before,
//   ...                                  // this is the current stream now,
//   // end of scope                      // and what the former one is given comes after.
//
// All of a solve runs on it, not the capture alone: the library keeps a workspace for each stream,
// which its products would otherwise share with products on other streams at the same time. Tensors
// of the former stream may be used and freed as if they were used there.

#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <vector>

namespace fastdeq {

// Streams live as long as the process; a thread that ends leaves its streams to the next one.
class StreamLease {
 public:
  explicit StreamLease(c10::DeviceIndex device) : device_(device) {
    const std::lock_guard<std::mutex> lock(mutex());
    std::vector<cudaStream_t>& free = unused()[device];
    if (free.empty()) {
      C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    } else {
      stream_ = free.back();
      free.pop_back();
    }
  }
  StreamLease(const StreamLease&) = delete;
  StreamLease& operator=(const StreamLease&) = delete;
  ~StreamLease() {
    const std::lock_guard<std::mutex> lock(mutex());
    unused()[device_].push_back(stream_);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  static std::mutex& mutex() {
    static auto* const made = new std::mutex;  // outlives every thread
    return *made;
  }
  static std::map<c10::DeviceIndex, std::vector<cudaStream_t>>& unused() {
    static auto* const made = new std::map<c10::DeviceIndex, std::vector<cudaStream_t>>;
    return *made;
  }

  c10::DeviceIndex device_;
  cudaStream_t stream_ = nullptr;
};

// The calling thread's stream on `device`, which is the current one.
inline c10::cuda::CUDAStream own_stream(c10::DeviceIndex device) {
  thread_local std::map<c10::DeviceIndex, StreamLease> leases;
  return c10::cuda::getStreamFromExternal(leases.try_emplace(device, device).first->second.stream(),
                                          device);
}

class ForkedStream {
 public:
  explicit ForkedStream(c10::DeviceIndex device)
      : before_(c10::cuda::getCurrentCUDAStream(device)),
        own_(own_stream(device)),
        guard_(make_wait(own_, before_)) {}
  ForkedStream(const ForkedStream&) = delete;
  ForkedStream& operator=(const ForkedStream&) = delete;
  ~ForkedStream() { C10_CUDA_CHECK_WARN(wait(before_, own_)); }

  cudaStream_t stream() const { return own_.stream(); }

 private:
  // `later` goes on when `earlier` has come as far as it has been told by now.
  static cudaError_t wait(c10::cuda::CUDAStream later, c10::cuda::CUDAStream earlier) {
    cudaEvent_t event = nullptr;
    cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (error != cudaSuccess) return error;
    error = cudaEventRecord(event, earlier.stream());
    if (error == cudaSuccess) error = cudaStreamWaitEvent(later.stream(), event, 0);
    const cudaError_t destroyed = cudaEventDestroy(event);  // once it is no longer needed
    return error != cudaSuccess ? error : destroyed;
  }
  static c10::cuda::CUDAStream make_wait(c10::cuda::CUDAStream later,
                                         c10::cuda::CUDAStream earlier) {
    C10_CUDA_CHECK(wait(later, earlier));
    return later;
  }

  const c10::cuda::CUDAStream before_, own_;
  const c10::cuda::CUDAStreamGuard guard_;
};

}  // namespace fastdeq
