// Shared memory, asynchronous copies, the lanes of a warp, and a barrier for the blocks of a group.
// Without CUDA, tests/cuda_emulator stands in for all of it.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastdeq {
namespace cuda {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(__CUDACC__)

// The dynamic shared memory of the block.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastdeq_shared_memory[];
  return fastdeq_shared_memory;
}

// 16 bytes from global memory, by way of the second-level cache, where other blocks' __stcg are
// seen, to shared memory; both addresses are multiples of 16. There after `wait_copies`, for the
// copying thread alone until the block synchronises.
__device__ inline void copy_async(void* shared, const void* global) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<float4*>(shared) = __ldcg(static_cast<const float4*>(global));
#endif
}

__device__ inline void wait_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Reads that come after see what was written before the value was.
__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

#else

inline unsigned char* shared_memory() { return cuda_emulator::machine.shared(); }
inline void copy_async(void* shared, const void* global) {
  cuda_emulator::machine.copy_async(shared, global);
}
inline void wait_copies() { cuda_emulator::machine.wait_copies(); }
inline unsigned load_acquire(const unsigned* at) {
  return cuda_emulator::machine.acquire(at, __FILE__, __LINE__);
}

#endif

// The lanes of a warp, for code that any number of lanes can share.
struct WarpLanes {
  __device__ int first() const { return int(threadIdx.x % kWarpLanes); }
  __device__ int stride() const { return kWarpLanes; }
  __device__ void sync() const { __syncwarp(); }
};

// A barrier for the `members` blocks of a group, all of them resident: what a block wrote by __stcg
// before it, the others read by __ldcg or copy_async after it. `counter` starts at 0 and only
// grows, so that it needs no reset; a difference of counts survives their overflow.
class GroupBarrier {
 public:
  __device__ GroupBarrier(unsigned* counter, int members)
      : counter_(counter), members_(unsigned(members)) {}

  // Called by all threads.
  __device__ void wait() {
    __syncthreads();
    if (members_ == 1) return;
    target_ += members_;
    if (threadIdx.x == 0) {
      __threadfence();  // of the whole block's writes: they happened before __syncthreads
      atomicAdd(counter_, 1u);
      while (int(load_acquire(counter_) - target_) < 0) {
      }
    }
    __syncthreads();
  }

 private:
  unsigned* counter_;
  unsigned members_;
  unsigned target_ = 0;
};

}  // namespace cuda
}  // namespace fastdeq
