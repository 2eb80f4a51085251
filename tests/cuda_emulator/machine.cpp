// Kernels with and without errors, for tests of the emulated machine itself.

#include <cuda_runtime.h>

#include <exception>
#include <vector>

#include "cuda/device.cuh"

namespace {

using namespace fastdeq::cuda;

constexpr unsigned kThreads = 64;

struct alignas(16) Four {
  float at[4];
};

// Each block adds up its part of `in` by halving; each block then adds up what the others found.
__global__ void sum_of_blocks(const int* in, int* parts, int* out, unsigned* counter) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();  // halves
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) __stcg(parts + blockIdx.x, shared[0]);
  GroupBarrier(counter, int(gridDim.x)).wait();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += __ldcg(parts + b);
  if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = sum;
}

// Neighbours copy for each other; `waits` for their copies.
__global__ void copy_for_neighbour(const Four* in, Four* out, bool waits) {
  Four* const shared = reinterpret_cast<Four*>(shared_memory());
  copy_async(shared + threadIdx.x, in + threadIdx.x);
  if (waits) wait_copies();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
  wait_copies();
}

__global__ void warp_totals(const double* in, double* out, unsigned* votes) {
  double value = in[threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  out[threadIdx.x] = value;
  votes[threadIdx.x] = __ballot_sync(kAllLanes, in[threadIdx.x] > 0);
}

__global__ void wait_for_nobody(unsigned* counter) {
  if (blockIdx.x == 0) GroupBarrier(counter, int(gridDim.x)).wait();
}

__global__ void leave_one_behind() {
  if (threadIdx.x != 0) __syncthreads();
}

__global__ void write_beyond() {
  if (threadIdx.x == 0) shared_memory()[kThreads] = 1;
}

template <typename Kernel, typename... Arguments>
const char* reported(const char* skip, uint64_t seed, unsigned blocks, size_t shared, Kernel kernel,
                     Arguments... arguments) {
  static std::string message;
  message.clear();
  cuda_emulator::machine.skip = skip;
  try {
    emulate(kernel, blocks, kThreads, shared, seed, arguments...);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

int machine_skipped() { return cuda_emulator::machine.skipped; }

const char* machine_sum(const int* in, int* out, int blocks, uint64_t seed, const char* skip) {
  std::vector<int> parts(size_t(blocks), -1000);
  unsigned counter = 0;
  return reported(skip, seed, unsigned(blocks), kThreads * sizeof(int), &sum_of_blocks, in,
                  parts.data(), out, &counter);
}

const char* machine_copy(const float* in, float* out, int waits, uint64_t seed) {
  return reported("", seed, 1, kThreads * sizeof(Four), &copy_for_neighbour,
                  reinterpret_cast<const Four*>(in), reinterpret_cast<Four*>(out), waits != 0);
}

const char* machine_warps(const double* in, double* out, unsigned* votes, uint64_t seed) {
  return reported("", seed, 1, 0, &warp_totals, in, out, votes);
}

const char* machine_error(int which) {
  unsigned counter = 0;
  if (which == 0) return reported("", 0, 2, 0, &wait_for_nobody, &counter);
  if (which == 1) return reported("", 0, 1, 0, &leave_one_behind);
  return reported("", 0, 1, kThreads, &write_beyond);
}
}
